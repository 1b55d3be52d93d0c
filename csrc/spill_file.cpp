#include "spill_file.hpp"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "check.hpp"

namespace petalsd {

namespace {

constexpr std::int64_t kGrowthBytes = 64 << 20;  // at least, so that few sessions wait for the file system
constexpr std::size_t kMaxPieces = 1024;         // IOV_MAX of Linux

using Move = ssize_t (*)(int, const iovec*, int, off_t);

[[noreturn]] void fail(const char* what, int error) { throw SpillFailure(text(what, ": ", std::strerror(error))); }

// A file of ours alone, that is gone when it is closed. Its name is never seen where the file system has O_TMPFILE.
int open_unnamed(const std::string& directory) {
  int fd = ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600);
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return fd;
  std::string name = directory + "/.kv-spill-XXXXXX";
  fd = ::mkostemp(name.data(), O_CLOEXEC);  // mode 0600
  if (fd >= 0) ::unlink(name.c_str());
  return fd;
}

// Moves all of `pieces`, which lie one after the other in the file from `offset` on. They are used up.
void move_all(Move move, int fd, std::vector<iovec>& pieces, off_t offset, const char* what) {
  for (std::size_t at = 0; at < pieces.size();) {
    const ssize_t moved = move(fd, pieces.data() + at, static_cast<int>(pieces.size() - at), offset);
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0) fail(what, errno);
    if (moved == 0) fail(what, EIO);  // the file ends too early
    offset += moved;
    auto left = static_cast<std::size_t>(moved);
    for (; at < pieces.size() && left >= pieces[at].iov_len; ++at) left -= pieces[at].iov_len;
    if (left == 0) continue;
    pieces[at].iov_base = static_cast<std::byte*>(pieces[at].iov_base) + left;
    pieces[at].iov_len -= left;
  }
  pieces.clear();
}

// Transfers whose slots follow each other go in one call.
void move_pages(Move move, int fd, const std::vector<Transfer>& transfers, const std::vector<Slab>& slabs,
                const char* what) {
  std::size_t page_bytes = 0;
  for (const Slab& slab : slabs) page_bytes += slab.page_bytes;
  std::vector<iovec> pieces;
  std::int64_t first_slot = 0;
  std::int64_t next_slot = -1;
  const auto flush = [&] {
    move_all(move, fd, pieces, static_cast<off_t>(first_slot * static_cast<std::int64_t>(page_bytes)), what);
  };
  for (const Transfer& transfer : transfers) {
    if (transfer.slot != next_slot || pieces.size() + slabs.size() > kMaxPieces) {
      flush();
      first_slot = transfer.slot;
    }
    for (const Slab& slab : slabs) {
      pieces.push_back({slab.address + static_cast<std::size_t>(transfer.page) * slab.page_bytes,
                        static_cast<std::size_t>(transfer.pages) * slab.page_bytes});
    }
    next_slot = std::int64_t{transfer.slot} + transfer.pages;
  }
  flush();
}

}  // namespace

SpillFile::SpillFile(std::string directory, std::int64_t max_bytes, std::int64_t keep_free_bytes)
    : directory_(std::move(directory)), max_bytes_(max_bytes), keep_free_bytes_(keep_free_bytes) {
  PETALSD_CHECK(max_bytes >= 0 && keep_free_bytes >= 0, "max_bytes = ", max_bytes, ", keep_free_bytes = ",
                keep_free_bytes, ": sizes are not negative");
}

SpillFile::~SpillFile() { close(); }

void SpillFile::open(std::int64_t page_bytes, std::int64_t pages_elsewhere) {
  const std::lock_guard lock(mutex_);
  PETALSD_CHECK(page_bytes >= 1, "page_bytes = ", page_bytes, ": a page holds something");
  PETALSD_CHECK(pages_elsewhere >= 0, "pages_elsewhere = ", pages_elsewhere, ": it is a number of pages");
  PETALSD_CHECK(fd_ < 0, "the spill file is open");
  pages_elsewhere_ = pages_elsewhere;
  if (max_bytes_ == 0) return;
  fd_ = open_unnamed(directory_);
  if (fd_ < 0) fail("the spill file cannot be made", errno);
  page_bytes_ = page_bytes;
}

std::int64_t SpillFile::grow_to(std::int64_t pages) {
  const std::lock_guard lock(mutex_);
  const std::int64_t most = max_bytes_ / page_bytes_ * page_bytes_;
  const std::int64_t needed = std::max<std::int64_t>(pages - pages_elsewhere_, 0) * page_bytes_;
  if (fd_ < 0 || needed > most) return pages_elsewhere_ + allocated_bytes_ / page_bytes_;
  if (needed > allocated_bytes_) {
    is_refused_ = !allocate(std::min(most, std::max(needed, allocated_bytes_ + kGrowthBytes))) && !allocate(needed);
  }
  return pages_elsewhere_ + allocated_bytes_ / page_bytes_;
}

std::int64_t SpillFile::limit() const {
  const std::lock_guard lock(mutex_);
  if (fd_ < 0) return pages_elsewhere_;
  return pages_elsewhere_ + (is_refused_ ? allocated_bytes_ : max_bytes_) / page_bytes_;
}

bool SpillFile::allocate(std::int64_t bytes) {
  struct statvfs disk;
  if (::fstatvfs(fd_, &disk) != 0) return false;
  const auto free_bytes = static_cast<std::int64_t>(disk.f_bavail) * static_cast<std::int64_t>(disk.f_frsize);
  const std::int64_t more = bytes - allocated_bytes_;
  if (free_bytes - more < keep_free_bytes_) return false;
  int error;
  do {
    error = ::posix_fallocate(fd_, allocated_bytes_, more);
  } while (error == EINTR);
  if (error != 0) {
    // What it had allocated on the way goes back; if even that fails, it is gone with the file.
    [[maybe_unused]] const int ignored = ::ftruncate(fd_, allocated_bytes_);
    return false;
  }
  allocated_bytes_ = bytes;
  return true;
}

void SpillFile::clear() {
  const std::lock_guard lock(mutex_);
  if (fd_ < 0 || ::ftruncate(fd_, 0) != 0) return;
  allocated_bytes_ = 0;
  is_refused_ = false;
}

void SpillFile::write(const std::vector<Transfer>& transfers, const std::vector<Slab>& slabs) const {
  move_pages(::pwritev, fd_, transfers, slabs, "writing to the spill file failed");
}

void SpillFile::read(const std::vector<Transfer>& transfers, const std::vector<Slab>& slabs) const {
  move_pages(::preadv, fd_, transfers, slabs, "reading from the spill file failed");
}

std::int64_t SpillFile::allocated_bytes() const {
  const std::lock_guard lock(mutex_);
  return allocated_bytes_;
}

void SpillFile::close() {
  const std::lock_guard lock(mutex_);
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  allocated_bytes_ = 0;
  pages_elsewhere_ = 0;
}

}  // namespace petalsd

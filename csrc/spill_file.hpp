// The file that holds the pages of idle sessions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "credit_backing.hpp"
#include "free_space.hpp"

namespace petalsd {

// Pages page .. page + pages - 1 of memory, and as many slots of the file from `slot` on.
struct Transfer {
  Page page;
  Page slot;
  Page pages;
};

// One kind of content of a page (keys, values, ...): page p lies at address + p * page_bytes.
struct Slab {
  std::byte* address;
  std::size_t page_bytes;
};

// A slot has room for one page of all slabs. The slots of a transfer hold its pages slab by slab, so that each slab's
// part is one piece on both sides and many pieces go in one system call.
//
// The file has no name and mode 0600: nobody else can open it, and its content is gone with the last descriptor,
// however the process ends. Its space is allocated before it is promised, never sparse.
//
// Threads: `read` and `write` belong to one thread, everything else may be called from any; `close` only once nobody
// reads or writes. Throws SpillFailure with the system's reason.
class SpillFile final : public CreditBacking {
 public:
  // At most `max_bytes`, and only as long as the file system keeps `keep_free_bytes` beside it.
  SpillFile(std::string directory, std::int64_t max_bytes, std::int64_t keep_free_bytes);
  ~SpillFile() override;
  SpillFile(const SpillFile&) = delete;
  SpillFile& operator=(const SpillFile&) = delete;

  // Makes the file, of slots of `page_bytes`; none where it may have no bytes. The first `pages_elsewhere` pages that
  // are promised lie in other memory, from now on and even if the file cannot be made.
  void open(std::int64_t page_bytes, std::int64_t pages_elsewhere = 0);

  std::int64_t grow_to(std::int64_t pages) override;
  std::int64_t limit() const override;
  void clear() override;

  // Copies pages to their slots, or back. `slabs` in the same order every time, their page_bytes together a slot.
  void write(const std::vector<Transfer>& transfers, const std::vector<Slab>& slabs) const;
  void read(const std::vector<Transfer>& transfers, const std::vector<Slab>& slabs) const;

  std::int64_t allocated_bytes() const;

  // Gives the space back; nothing can be stored any more.
  void close();

 private:
  bool allocate(std::int64_t bytes);

  const std::string directory_;
  const std::int64_t max_bytes_;
  const std::int64_t keep_free_bytes_;
  mutable std::mutex mutex_;  // for what follows; the thread that reads and writes relies on `fd_` alone
  int fd_ = -1;
  std::int64_t page_bytes_ = 1;
  std::int64_t pages_elsewhere_ = 0;
  std::int64_t allocated_bytes_ = 0;
  bool is_refused_ = false;  // the file system did not give what was asked for last
};

}  // namespace petalsd

// The errors of the pool and the checks that raise them. bindings.cpp maps each class to one of petalsd.errors.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace petalsd {

// A broken invariant, or a call against the contract in page_pool.hpp: petalsd.errors.KVPoolError.
class PoolError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// The pool cannot promise the pages: petalsd.errors.OutOfPages. `hint` says what to do.
class OutOfPages : public std::runtime_error {
 public:
  OutOfPages(const std::string& message, std::string what_to_do)
      : std::runtime_error(message), hint(std::move(what_to_do)) {}
  const std::string hint;
};

// The spill file could not be made, read or written: petalsd.errors.SpillError.
class SpillFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The handle was closed before: petalsd.errors.SessionClosed.
class ClosedHandle : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// "csrc/page_pool.cpp" -> "page_pool.cpp": messages may reach other machines and name no directories.
constexpr const char* file_name(const char* path) {
  const char* name = path;
  for (const char* at = path; *at != '\0'; ++at) {
    if (*at == '/') name = at + 1;
  }
  return name;
}

template <typename Left, typename Right, typename... Parts>
void check_equal(const char* where, int line, const Left& left, const Right& right, const Parts&... parts) {
  if (left != right) throw PoolError(text(where, ":", line, ": ", parts..., ": ", left, " != ", right));
}

}  // namespace petalsd

#define PETALSD_CHECK(condition, ...)                                                                         \
  do {                                                                                                        \
    if (!(condition))                                                                                         \
      throw ::petalsd::PoolError(                                                                             \
          ::petalsd::text(::petalsd::file_name(__FILE__), ":", __LINE__, ": ", __VA_ARGS__));                 \
  } while (0)

// Both sides stand in the message; the parts after them say what they are, in the order left = right.
#define PETALSD_CHECK_EQUAL(left, right, ...) \
  ::petalsd::check_equal(::petalsd::file_name(__FILE__), __LINE__, left, right, __VA_ARGS__)

// Tensors come from Python as the addresses of their first elements; the caller keeps them alive.
#pragma once

#include <cstdint>

namespace petalsd {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: this is where addresses come in
}

}  // namespace petalsd

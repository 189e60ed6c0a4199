#ifndef FLASHTRAIN_PYTHON_BINDINGS_DLPACK_ABI_H_
#define FLASHTRAIN_PYTHON_BINDINGS_DLPACK_ABI_H_

// The part of the DLPack 1.3 ABI that a consumer of tensors needs. Layouts and constants are those
// of the specification (https://dmlc.github.io/dlpack/latest/c_api.html), which fixes them for the
// whole of major version 1.

#include <cstdint>

namespace flashtrain::dlpack {

inline constexpr uint32_t kMajorVersion = 1;

inline constexpr int32_t kCpu = 1;  // DLDeviceType
inline constexpr int32_t kCuda = 2;
inline constexpr int32_t kCudaHost = 3;  // pinned host memory: an ordinary CPU pointer to us

inline constexpr uint8_t kInt = 0;  // DLDataTypeCode
inline constexpr uint8_t kUInt = 1;
inline constexpr uint8_t kFloat = 2;
inline constexpr uint8_t kBfloat = 4;

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous before DLPack 1.2
  uint64_t byte_offset;
};

// What a capsule named "dltensor" holds.
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

// What a capsule named "dltensor_versioned" holds.
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
};

struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  DLPackExchangeAPIHeader* prev_api;  // an older major version, or null
};

// What the capsule `type(tensor).__dlpack_c_exchange_api__`, named "dlpack_exchange_api", holds.
struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills *out with a view that lives as long as the object and its shape do. Returns 0, or -1 with
  // a Python error set. May be null.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

}  // namespace flashtrain::dlpack

#endif  // FLASHTRAIN_PYTHON_BINDINGS_DLPACK_ABI_H_

#include "python/flashtrain/bindings/tensor_arg.h"

#include <optional>
#include <stdexcept>

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;
using dlpack::DLTensor;

const char* ElementTypeName(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "float32";
    case ElementType::kFloat16:
      return "float16";
    case ElementType::kBFloat16:
      return "bfloat16";
    case ElementType::kInt32:
      return "int32";
    case ElementType::kInt64:
      return "int64";
    case ElementType::kUInt8:
      return "uint8";
  }
  return "unknown";
}

std::string DLDataTypeName(dlpack::DLDataType type) {
  static constexpr const char* kCodeNames[] = {"int",    "uint",    "float", "handle",
                                               "bfloat", "complex", "bool"};
  std::string name = type.code < 7 ? kCodeNames[type.code] : "float8-like";
  return name + std::to_string(type.bits);
}

std::optional<ElementType> ToElementType(dlpack::DLDataType type) {
  if (type.lanes != 1) return std::nullopt;
  switch (type.code << 8 | type.bits) {
    case dlpack::kFloat << 8 | 32:
      return ElementType::kFloat32;
    case dlpack::kFloat << 8 | 16:
      return ElementType::kFloat16;
    case dlpack::kBfloat << 8 | 16:
      return ElementType::kBFloat16;
    case dlpack::kInt << 8 | 32:
      return ElementType::kInt32;
    case dlpack::kInt << 8 | 64:
      return ElementType::kInt64;
    case dlpack::kUInt << 8 | 8:
      return ElementType::kUInt8;
  }
  return std::nullopt;
}

using ViewFunction = int (*)(void* py_object, DLTensor* out);

// The type's non-owning view function, or null where the type has none.
ViewFunction LookUpViewFunction(PyTypeObject* type) {
  const py::object capsule =
      py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* header = static_cast<dlpack::DLPackExchangeAPIHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) {
    header = header->prev_api;
  }
  if (header == nullptr) return nullptr;
  return reinterpret_cast<dlpack::DLPackExchangeAPI*>(header)->dltensor_from_py_object_no_sync;
}

// The same, remembering the last two types (a program passes torch.Tensor and Parameter, and little
// else). The GIL guards the memory.
ViewFunction FindViewFunction(PyTypeObject* type) {
  static struct {
    PyTypeObject* type;
    ViewFunction function;
  } memory[2] = {};
  for (const auto& entry : memory) {
    if (entry.type == type) return entry.function;
  }
  const ViewFunction function = LookUpViewFunction(type);
  PyTypeObject* forgotten = memory[1].type;
  memory[1] = memory[0];
  memory[0] = {type, function};
  Py_INCREF(type);  // its address must not come to name another type while it is remembered
  Py_XDECREF(forgotten);
  return function;
}

DLTensor ViewOfCapsule(const char* name, PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor")) {
    return static_cast<dlpack::DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))
        ->dl_tensor;
  }
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    auto* managed = static_cast<dlpack::DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->version.major == dlpack::kMajorVersion) return managed->dl_tensor;
    throw std::invalid_argument(std::string(name) + ": DLPack major version " +
                                std::to_string(managed->version.major) + "; supported: 1");
  }
  throw std::invalid_argument(std::string(name) +
                              ": the DLPack capsule is not a tensor, or was consumed already");
}

std::string Join(const int64_t* values, int n) {
  std::string out = "[";
  for (int i = 0; i < n; ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + "]";
}

}  // namespace

TensorArg::TensorArg(const char* name, py::handle object) : name_(name) {
  if (ViewFunction view = FindViewFunction(Py_TYPE(object.ptr()))) {
    if (view(object.ptr(), &view_) != 0) throw py::error_already_set();
  } else if (PyCapsule_CheckExact(object.ptr())) {
    view_ = ViewOfCapsule(name, object.ptr());
  } else if (py::hasattr(object, "__dlpack__")) {
    capsule_ = object.attr("__dlpack__")();
    view_ = ViewOfCapsule(name, capsule_.ptr());
  } else {
    throw py::type_error(std::string(name) + ": got " + Py_TYPE(object.ptr())->tp_name +
                         "; supported: a tensor (an object with __dlpack__) or a DLPack capsule");
  }
  const int32_t device = view_.device.device_type;
  if (device != dlpack::kCpu && device != dlpack::kCuda && device != dlpack::kCudaHost) {
    throw std::invalid_argument(std::string(name) + ": is on a device of DLPack type " +
                                std::to_string(device) + "; supported: CPU and CUDA");
  }
  const std::optional<ElementType> type = ToElementType(view_.dtype);
  if (!type.has_value()) {
    throw std::invalid_argument(std::string(name) + ": got dtype " + DLDataTypeName(view_.dtype) +
                                "; supported: float32, float16, bfloat16, int32, int64, uint8");
  }
  element_type_ = *type;
}

int64_t TensorArg::stride(int dim) const {
  if (view_.strides != nullptr) return view_.strides[dim];
  int64_t stride = 1;
  for (int i = view_.ndim - 1; i > dim; --i) stride *= view_.shape[i];
  return stride;
}

DType TensorArg::float_dtype() const {
  switch (element_type_) {
    case ElementType::kFloat32:
      return DType::kFloat32;
    case ElementType::kFloat16:
      return DType::kFloat16;
    case ElementType::kBFloat16:
      return DType::kBFloat16;
    default:
      Fail("dtype float32, float16 or bfloat16");
  }
}

void TensorArg::ExpectFloat(DType dtype) const {
  if (float_dtype() != dtype) Fail(std::string("dtype ") + DTypeName(dtype));
}

void TensorArg::ExpectElementType(ElementType type) const {
  if (element_type_ != type) Fail(std::string("dtype ") + ElementTypeName(type));
}

void TensorArg::ExpectSameDevice(const TensorArg& other) const {
  if (is_cuda() != other.is_cuda() || device_index() != other.device_index()) {
    Fail("the device of " + std::string(other.name_) + ", " +
         (other.is_cuda() ? "cuda:" + std::to_string(other.device_index()) : "cpu"));
  }
}

void TensorArg::ExpectShape(const int64_t* shape, int ndim) const {
  bool same = view_.ndim == ndim;
  for (int i = 0; same && i < ndim; ++i) same = view_.shape[i] == shape[i];
  if (!same) Fail("shape " + Join(shape, ndim));
}

void TensorArg::ExpectContiguous() const {
  int64_t expected = 1;
  bool contiguous = true;
  for (int i = view_.ndim - 1; i >= 0; --i) {
    if (view_.shape[i] == 0) return;
    if (view_.shape[i] > 1 && stride(i) != expected) contiguous = false;
    expected *= view_.shape[i];
  }
  if (!contiguous) Fail("a contiguous tensor");
}

TensorArg::Matrix TensorArg::ExpectMatrix() const {
  if (ndim() == 0) Fail("at least one dimension, [..., cols]");
  const int last = ndim() - 1;
  Matrix matrix = {1, size(last), size(last)};
  for (int i = 0; i < last; ++i) matrix.rows *= size(i);
  if (matrix.rows == 0 || matrix.cols == 0) return matrix;

  if (matrix.cols > 1 && stride(last) != 1) Fail("adjacent elements in the last dimension");
  // Dimensions of size 1 may report any stride and do not count.
  int64_t inner_rows = 1;
  for (int i = last - 1; i >= 0; --i) {
    if (size(i) == 1) continue;
    if (inner_rows == 1) {
      matrix.row_stride = stride(i);
    } else if (stride(i) != matrix.row_stride * inner_rows) {
      Fail("one stride from row to row through all leading dimensions");
    }
    inner_rows *= size(i);
  }
  return matrix;
}

void TensorArg::Fail(const std::string& expected) const {
  std::string got =
      std::string(ElementTypeName(element_type_)) + " " + Join(view_.shape, view_.ndim);
  if (view_.strides != nullptr) got += " with strides " + Join(view_.strides, view_.ndim);
  got += is_cuda() ? " on cuda:" + std::to_string(device_index()) : " on cpu";
  throw std::invalid_argument(std::string(name_) + ": got " + got + "; supported: " + expected);
}

}  // namespace flashtrain::bindings

#include "python/flashtrain/bindings/tensor_arg.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

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

// What is known of a type of tensors.
struct TensorType {
  PyTypeObject* type = nullptr;
  ViewFunction view = nullptr;   // non-owning; null: none
  PyCFunction is_neg = nullptr;  // torch's method without arguments; null: none
  bool has_own_dispatch =
      false;  // a subclass of torch.Tensor that has no memory, or others' memory
};

// The type's non-owning view function, or null where the type has none.
ViewFunction LookUpViewFunction(py::handle type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* header = static_cast<dlpack::DLPackExchangeAPIHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) {
    header = header->prev_api;
  }
  if (header == nullptr) return nullptr;
  return reinterpret_cast<dlpack::DLPackExchangeAPI*>(header)->dltensor_from_py_object_no_sync;
}

// The C function of `type.is_neg`, to call without the interpreter.
PyCFunction LookUpIsNeg(py::handle type) {
  const py::object method = py::getattr(type, "is_neg", py::none());
  if (!Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type)) return nullptr;
  const PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
  return definition->ml_flags == METH_NOARGS ? definition->ml_meth : nullptr;
}

// torch's own types have a `__torch_dispatch__` that is a built-in function.
bool HasOwnDispatch(py::handle type) {
  const py::object dispatch = py::getattr(type, "__torch_dispatch__", py::none());
  return !dispatch.is_none() && !PyCFunction_Check(dispatch.ptr());
}

// Remembers the last two types (a program passes torch.Tensor and Parameter, and little else). The
// GIL guards the memory.
TensorType FindTensorType(PyTypeObject* type) {
  static TensorType memory[2];
  for (const TensorType& entry : memory) {
    if (entry.type == type) return entry;
  }
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  const TensorType found = {type, LookUpViewFunction(handle), LookUpIsNeg(handle),
                            HasOwnDispatch(handle)};
  PyTypeObject* forgotten = memory[1].type;
  memory[1] = memory[0];
  memory[0] = found;
  Py_INCREF(type);  // its address must not come to name another type while it is remembered
  Py_XDECREF(forgotten);
  return found;
}

// Raises the Python error that is set, as a ValueError that names the argument. What no argument
// causes (MemoryError, KeyboardInterrupt) is raised as it is.
[[noreturn]] void ThrowNamed(const char* name) {
  py::error_already_set error;
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw error;
  const std::string message = std::string(name) + ": cannot be read as a tensor with memory: " +
                              std::string(py::str(error.value()));
  py::raise_from(error, PyExc_ValueError, message.c_str());
  throw py::error_already_set();
}

bool IsNegative(const char* name, PyCFunction is_neg, PyObject* tensor) {
  const auto result = py::reinterpret_steal<py::object>(is_neg(tensor, nullptr));
  if (!result) ThrowNamed(name);
  return result.ptr() == Py_True;
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
  const TensorType type = FindTensorType(Py_TYPE(object.ptr()));
  if (type.has_own_dispatch) {
    throw std::invalid_argument(std::string(name) + ": got " + type.type->tp_name +
                                ", a subclass that has no memory of its own; supported: plain "
                                "tensors");
  }
  if (type.view != nullptr) {
    if (type.view(object.ptr(), &view_) != 0) ThrowNamed(name);
    if (type.is_neg != nullptr && IsNegative(name, type.is_neg, object.ptr())) {
      throw std::invalid_argument(std::string(name) +
                                  ": got a view with a negative bit; supported: " + name +
                                  ".resolve_neg()");
    }
  } else if (PyCapsule_CheckExact(object.ptr())) {
    view_ = ViewOfCapsule(name, object.ptr());
  } else if (py::hasattr(object, "__dlpack__")) {
    const auto capsule =
        py::reinterpret_steal<py::object>(PyObject_CallMethod(object.ptr(), "__dlpack__", nullptr));
    if (!capsule) ThrowNamed(name);
    py::detail::loader_life_support::add_patient(capsule);
    view_ = ViewOfCapsule(name, capsule.ptr());
  } else {
    throw py::type_error(std::string(name) + ": got " + Py_TYPE(object.ptr())->tp_name +
                         "; supported: a tensor (an object with __dlpack__) or a DLPack capsule");
  }
  const int32_t device = view_.device.device_type;
  if (device != dlpack::kCpu && device != dlpack::kCuda && device != dlpack::kCudaHost) {
    throw std::invalid_argument(std::string(name) + ": is on a device of DLPack type " +
                                std::to_string(device) + "; supported: CPU and CUDA");
  }
  const std::optional<ElementType> element_type = ToElementType(view_.dtype);
  if (!element_type.has_value()) {
    throw std::invalid_argument(std::string(name) + ": got dtype " + DLDataTypeName(view_.dtype) +
                                "; supported: float32, float16, bfloat16, int32, int64, uint8");
  }
  element_type_ = *element_type;
  CheckSizesAndMemory();
}

void TensorArg::CheckSizesAndMemory() const {
  int64_t elements = 1;  // dimensions of no elements aside
  bool empty = false;
  for (int i = 0; i < view_.ndim; ++i) {
    const int64_t size = view_.shape[i];
    empty = empty || size == 0;
    if (size < 0 || __builtin_mul_overflow(elements, std::max<int64_t>(size, 1), &elements) ||
        elements > kMaxTensorElements) {
      Fail("sizes of at most 2**48 elements");
    }
  }
  if (empty) return;
  for (int i = 0; i < view_.ndim && view_.strides != nullptr; ++i) {
    int64_t extent = 0;
    if (view_.shape[i] > 1 &&
        (__builtin_mul_overflow(view_.shape[i] - 1, view_.strides[i], &extent) ||
         extent > kMaxTensorElements || extent < -kMaxTensorElements)) {
      Fail("strides that span at most 2**48 elements");
    }
  }
  // Of a tensor whose memory was freed, DLPack gives the offset of its first element.
  constexpr uintptr_t kFirstAddress = 65536;  // what Linux lets no process map below
  const auto address = reinterpret_cast<uintptr_t>(data());
  if (address < kFirstAddress) Fail("a tensor with memory (this one's storage was freed)");
  if (address % (view_.dtype.bits / 8) != 0) Fail("elements at multiples of their size");
}

int64_t TensorArg::num_elements() const {
  int64_t count = 1;
  for (int i = 0; i < view_.ndim; ++i) count *= view_.shape[i];
  return count;
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

void TensorArg::ExpectNoOverlap() const {
  std::vector<std::pair<int64_t, int64_t>> dims;  // distance between neighbours, size
  for (int i = 0; i < view_.ndim; ++i) {
    if (view_.shape[i] == 0) return;
    if (view_.shape[i] > 1) dims.emplace_back(std::abs(stride(i)), view_.shape[i]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 0;  // of the dimensions before, from their first element to their last
  for (const auto& [distance, size] : dims) {
    if (distance <= extent) Fail("elements that share no memory, as they are written");
    extent += distance * (size - 1);
  }
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
  if (matrix.rows > 1 && matrix.row_stride < matrix.cols) Fail("rows that do not overlap");
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

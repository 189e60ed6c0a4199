#include "python/flashtrain/bindings/adamw_binding.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "flashtrain/adamw/adamw.h"
#include "python/flashtrain/bindings/call.h"

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;

// Whether the elements fill their memory without gaps, in whatever order.
bool IsDense(const TensorArg& arg) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  int64_t expected = 1;
  bool contiguous = true;
  for (int i = arg.ndim() - 1; i >= 0; --i) {
    if (arg.size(i) == 0) return true;
    if (arg.size(i) == 1) continue;
    contiguous = contiguous && arg.stride(i) == expected;
    expected *= arg.size(i);
    dims.emplace_back(arg.stride(i), arg.size(i));
  }
  if (contiguous) return true;
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The shape of `other`, and its elements in the same order in memory.
void ExpectLike(const TensorArg& arg, const TensorArg& other, const char* name) {
  arg.ExpectSameDevice(other);
  arg.ExpectShape(other.shape(), other.ndim());
  for (int i = 0; i < arg.ndim(); ++i) {
    if (arg.size(i) <= 1 || arg.stride(i) == other.stride(i) || arg.num_elements() == 0) continue;
    throw std::invalid_argument(
        std::string(name) + ": got stride " + std::to_string(arg.stride(i)) + " in dimension " +
        std::to_string(i) + "; supported: the parameter's, " + std::to_string(other.stride(i)));
  }
}

// A tensor of one element.
TensorArg ReadScalar(const char* name, py::handle object, ElementType type,
                     const TensorArg& device) {
  TensorArg arg(name, object);
  arg.ExpectSameDevice(device);
  arg.ExpectElementType(type);
  if (arg.num_elements() != 1) arg.ExpectShape({});
  return arg;
}

template <typename T>
void ReadOptional(const char* name, py::handle object, ElementType type, const TensorArg& device,
                  T** data) {
  if (!object.is_none()) *data = ReadScalar(name, object, type, device).data<T>();
}

// The lists of one call, all as long as `params`; tuples, as other threads may clear the caller's
// lists while the op runs.
struct Lists {
  py::tuple params, grads, masters, exp_avgs, exp_avg_sqs, steps, groups;
};

AdamWTensor ReadTensor(const Lists& lists, size_t i, const TensorArg& first) {
  const TensorArg param("param", lists.params[i]);
  param.ExpectSameDevice(first);
  AdamWTensor t;
  t.param = param.data(), t.param_dtype = param.float_dtype();
  t.numel = param.num_elements();
  const py::object group = lists.groups[i];
  if (!PyLong_Check(group.ptr())) {
    throw py::type_error(std::string("group: got ") + Py_TYPE(group.ptr())->tp_name +
                         "; supported: an index into group_values");
  }
  int overflow = 0;
  t.group = PyLong_AsLongLongAndOverflow(group.ptr(), &overflow);
  if (overflow != 0) t.group = -1;  // out of range, as AdamWStep says
  if (!IsDense(param)) {
    throw std::invalid_argument(
        "param: got a tensor with gaps between its elements; supported: dense ones, "
        "param.contiguous()");
  }
  const auto read_float = [&](const char* name, const py::tuple& list) -> float* {
    if (list[i].is_none()) return nullptr;
    const TensorArg arg(name, list[i]);
    arg.ExpectElementType(ElementType::kFloat32);
    ExpectLike(arg, param, name);
    return arg.data<float>();
  };
  t.master = read_float("master", lists.masters);
  t.exp_avg = read_float("exp_avg", lists.exp_avgs);
  t.exp_avg_sq = read_float("exp_avg_sq", lists.exp_avg_sqs);
  t.step = ReadScalar("step", lists.steps[i], ElementType::kFloat32, first).data<float>();
  if (!lists.grads[i].is_none()) {
    const TensorArg grad("grad", lists.grads[i]);
    ExpectLike(grad, param, "grad");
    // An empty tensor may have no address, but it has a gradient.
    t.grad = t.numel == 0 ? t.step : grad.data();
    t.grad_dtype = grad.float_dtype();
  }
  return t;
}

// Two threads would update what two parameters share.
void ExpectDisjoint(const std::vector<AdamWTensor>& tensors) {
  std::vector<std::pair<const char*, size_t>> begins;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel > 0) begins.emplace_back(static_cast<const char*>(tensors[i].param), i);
  }
  std::sort(begins.begin(), begins.end());
  for (size_t i = 1; i < begins.size(); ++i) {
    const AdamWTensor& before = tensors[begins[i - 1].second];
    if (begins[i - 1].first + before.numel * DTypeSize(before.param_dtype) <= begins[i].first) {
      continue;
    }
    throw std::invalid_argument("parameter " + std::to_string(begins[i].second) +
                                ": param shares memory with that of parameter " +
                                std::to_string(begins[i - 1].second) +
                                "; supported: parameters with memory of their own");
  }
}

std::vector<AdamWTensor> ReadTensors(const Lists& lists, const TensorArg& first) {
  const size_t count = lists.params.size();
  for (const py::tuple* list : {&lists.grads, &lists.masters, &lists.exp_avgs, &lists.exp_avg_sqs,
                                &lists.steps, &lists.groups}) {
    if (list->size() == count) continue;
    throw std::invalid_argument("got lists of " + std::to_string(count) + " and " +
                                std::to_string(list->size()) + "; supported: all of one length");
  }
  std::vector<AdamWTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    try {
      tensors[i] = ReadTensor(lists, i, first);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("parameter " + std::to_string(i) + ": " + error.what());
    }
  }
  ExpectDisjoint(tensors);
  return tensors;
}

// (lr, lr_on_device, beta1, beta2, eps, weight_decay), lr_on_device a tensor or None.
AdamWGroup ReadGroup(const py::tuple& values, const TensorArg& device) {
  if (values.size() != 6) {
    throw std::invalid_argument("group_values: got a tuple of " + std::to_string(values.size()) +
                                "; supported: 6 values");
  }
  const auto number = [&values](int i, const char* name) {
    const double value = PyFloat_AsDouble(py::object(values[i]).ptr());
    if (value != -1.0 || PyErr_Occurred() == nullptr) return value;
    PyErr_Clear();
    throw py::type_error(std::string(name) + ": got " +
                         Py_TYPE(py::object(values[i]).ptr())->tp_name +
                         "; supported: a number that a double holds");
  };
  AdamWGroup g;
  g.lr = number(0, "lr");
  ReadOptional("lr", values[1], ElementType::kFloat32, device, &g.lr_on_device);
  g.beta1 = number(2, "beta1"), g.beta2 = number(3, "beta2");
  g.eps = number(4, "eps"), g.weight_decay = number(5, "weight_decay");
  return g;
}

void Step(const py::list& params, const py::list& grads, const py::list& masters,
          const py::list& exp_avgs, const py::list& exp_avg_sqs, const py::list& steps,
          const py::list& groups, const py::list& group_values, py::handle grad_scale,
          py::handle grad_norm, py::handle skip, py::handle skipped_steps, double max_norm,
          py::handle table, py::handle table_on_host, uintptr_t stream) {
  if (params.empty()) return;
  const TensorArg first("params[0]", params[0]);
  const Lists lists = {params, grads, masters, exp_avgs, exp_avg_sqs, steps, groups};
  const std::vector<AdamWTensor> tensors = ReadTensors(lists, first);
  std::vector<AdamWGroup> group_structs;
  const py::tuple held_values = group_values;
  for (const py::handle values : held_values) {
    group_structs.push_back(ReadGroup(py::cast<py::tuple>(values), first));
  }
  AdamWParams p;
  p.tensors = tensors.data(), p.num_tensors = static_cast<int64_t>(tensors.size());
  p.groups = group_structs.data(), p.num_groups = static_cast<int64_t>(group_structs.size());
  ReadOptional("grad_scale", grad_scale, ElementType::kFloat32, first, &p.grad_scale);
  ReadOptional("grad_norm", grad_norm, ElementType::kFloat32, first, &p.grad_norm);
  ReadOptional("skip", skip, ElementType::kFloat32, first, &p.skip);
  ReadOptional("skipped_steps", skipped_steps, ElementType::kInt64, first, &p.skipped_steps);
  p.max_norm = max_norm;
  if (!table.is_none()) {
    const TensorArg arg("table", table);
    arg.ExpectSameDevice(first);
    arg.ExpectElementType(ElementType::kUInt8);
    arg.ExpectContiguous();
    p.table = arg.data(), p.table_bytes = arg.num_elements();
  }
  if (!table_on_host.is_none()) {
    const TensorArg arg("table_on_host", table_on_host);
    arg.ExpectElementType(ElementType::kUInt8);
    arg.ExpectShape({p.table_bytes});
    arg.ExpectContiguous();
    if (arg.is_cuda()) throw std::invalid_argument("table_on_host: is on a GPU; supported: cpu");
    p.table_on_host = arg.data();
  }
  Call(first, [&](Device device) { return AdamWStep(p, device, reinterpret_cast<void*>(stream)); });
}

int64_t TableBytes(int64_t num_tensors, int64_t num_groups) {
  constexpr int64_t kMax = int64_t{1} << 31;
  for (const auto& [count, name] :
       {std::pair(num_tensors, "num_tensors"), std::pair(num_groups, "num_groups")}) {
    if (count >= 0 && count < kMax) continue;
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(count) +
                                "; supported: 0 to 2**31 - 1");
  }
  return AdamWTableBytes(num_tensors, num_groups);
}

void Norm(const py::list& grads, py::handle norm, const py::function& allocate, uintptr_t stream) {
  const TensorArg result("norm", norm);
  result.ExpectElementType(ElementType::kFloat32);
  if (result.num_elements() != 1) result.ExpectShape({});
  std::vector<GradNormTensor> tensors;
  const py::tuple held_grads = grads;  // other threads may clear the list while the op runs
  for (const py::handle object : held_grads) {
    const TensorArg grad("grad", object);
    grad.ExpectSameDevice(result);
    if (!IsDense(grad)) {
      throw std::invalid_argument("grad " + std::to_string(tensors.size()) +
                                  ": got a tensor with gaps between its elements; supported: "
                                  "dense ones, grad.contiguous()");
    }
    tensors.push_back({grad.data(), grad.float_dtype(), grad.num_elements()});
  }
  GradNormParams p;
  p.tensors = tensors.data(), p.num_tensors = static_cast<int64_t>(tensors.size());
  p.norm = result.data<float>();
  p.workspace_bytes = GradNormWorkspaceBytes(p);
  const py::object workspace = AllocateWorkspace(result, allocate, p.workspace_bytes, &p.workspace);
  Call(result, [&](Device device) { return GradNorm(p, device, reinterpret_cast<void*>(stream)); });
}

}  // namespace

void RegisterAdamW(py::module_& module) {
  using py::arg;
  module.def("adamw_step", &Step, arg("params"), arg("grads"), arg("masters"), arg("exp_avgs"),
             arg("exp_avg_sqs"), arg("steps"), arg("groups"), arg("group_values"),
             arg("grad_scale"), arg("grad_norm"), arg("skip"), arg("skipped_steps"),
             arg("max_norm"), arg("table"), arg("table_on_host"), Integer("stream"));
  module.def("adamw_table_bytes", &TableBytes, Integer("num_tensors"), Integer("num_groups"));
  module.def("grad_norm", &Norm, arg("grads"), arg("norm"), arg("allocate"), Integer("stream"));
}

}  // namespace flashtrain::bindings

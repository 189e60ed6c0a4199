#include "python/flashtrain/bindings/cross_entropy_binding.h"

#include <cstdint>
#include <optional>

#include "flashtrain/cross_entropy/cross_entropy.h"
#include "python/flashtrain/bindings/call.h"
#include "python/flashtrain/bindings/rowwise_operands.h"

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;
using std::optional;

// What the three functions share, and the params struct that it fills.
struct Arguments {
  Arguments(py::handle logits, py::handle labels, float label_smoothing, float logit_scale,
            float lse_square_scale, int64_t ignore_index, int64_t first_class, int64_t num_classes)
      : operands("logits", logits) {
    p.rows = operands.rows();
    p.cols = operands.cols();
    operands.Matrix("logits", logits, &p.logits, &p.logits_row_stride, &dtype);
    bool is_int32 = false;
    operands.Labels("labels", labels, &p.labels, &is_int32);
    p.dtype = *dtype;
    p.label_type = is_int32 ? LabelType::kInt32 : LabelType::kInt64;
    p.label_smoothing = label_smoothing;
    p.logit_scale = logit_scale;
    p.lse_square_scale = lse_square_scale;
    p.ignore_index = ignore_index;
    p.first_class = first_class;
    p.num_classes = num_classes;
  }

  void Losses(py::handle losses, py::handle lse, py::handle z_losses) {
    operands.RowStatistics("losses", losses, &p.losses);
    operands.RowStatistics("lse", lse, &p.lse);
    operands.RowStatistics("z_losses", z_losses, &p.z_losses);
  }

  void Gradient(py::handle dlosses, py::handle dlogits) {
    operands.RowsOrOne("dlosses", dlosses, &p.dlosses, &p.dlosses_stride);
    operands.Matrix("dlogits", dlogits, &p.dlogits, &p.dlogits_row_stride, &dtype);
  }

  template <typename Function>
  void Run(Function function, uintptr_t stream) {
    Call(operands.first(),
         [&](Device device) { return function(p, device, reinterpret_cast<void*>(stream)); });
  }

  RowwiseOperands operands;
  optional<DType> dtype;
  CrossEntropyParams p;
};

void Forward(py::handle logits, py::handle labels, py::handle known_lse, float label_smoothing,
             float logit_scale, float lse_square_scale, int64_t ignore_index, int64_t first_class,
             int64_t num_classes, bool partial, py::handle losses, py::handle lse,
             py::handle z_losses, uintptr_t stream) {
  Arguments arguments(logits, labels, label_smoothing, logit_scale, lse_square_scale, ignore_index,
                      first_class, num_classes);
  arguments.operands.RowStatistics("known_lse", known_lse, &arguments.p.known_lse);
  arguments.Losses(losses, lse, z_losses);
  arguments.p.partial = partial;
  arguments.Run(CrossEntropyForward, stream);
}

void Backward(py::handle dlosses, py::handle logits, py::handle labels, py::handle lse,
              float label_smoothing, float logit_scale, float lse_square_scale,
              int64_t ignore_index, int64_t first_class, int64_t num_classes, py::handle dlogits,
              uintptr_t stream) {
  Arguments arguments(logits, labels, label_smoothing, logit_scale, lse_square_scale, ignore_index,
                      first_class, num_classes);
  arguments.operands.RowStatistics("lse", lse, &arguments.p.known_lse);
  arguments.Gradient(dlosses, dlogits);
  arguments.Run(CrossEntropyBackward, stream);
}

void ForwardBackward(py::handle logits, py::handle labels, py::handle dlosses,
                     float label_smoothing, float logit_scale, float lse_square_scale,
                     int64_t ignore_index, int64_t num_classes, py::handle losses,
                     py::handle z_losses, py::handle dlogits, uintptr_t stream) {
  Arguments arguments(logits, labels, label_smoothing, logit_scale, lse_square_scale, ignore_index,
                      /*first_class=*/0, num_classes);
  arguments.Losses(losses, py::none(), z_losses);
  arguments.Gradient(dlosses, dlogits);
  arguments.Run(CrossEntropyForwardBackward, stream);
}

}  // namespace

void RegisterCrossEntropy(py::module_& module) {
  using py::arg;
  module.def("cross_entropy_forward", &Forward, arg("logits"), arg("labels"), arg("known_lse"),
             arg("label_smoothing"), arg("logit_scale"), arg("lse_square_scale"),
             Integer("ignore_index"), Integer("first_class"), Integer("num_classes"),
             arg("partial"), arg("losses"), arg("lse"), arg("z_losses"), Integer("stream"));
  module.def("cross_entropy_backward", &Backward, arg("dlosses"), arg("logits"), arg("labels"),
             arg("lse"), arg("label_smoothing"), arg("logit_scale"), arg("lse_square_scale"),
             Integer("ignore_index"), Integer("first_class"), Integer("num_classes"),
             arg("dlogits"), Integer("stream"));
  module.def("cross_entropy_forward_backward", &ForwardBackward, arg("logits"), arg("labels"),
             arg("dlosses"), arg("label_smoothing"), arg("logit_scale"), arg("lse_square_scale"),
             Integer("ignore_index"), Integer("num_classes"), arg("losses"), arg("z_losses"),
             arg("dlogits"), Integer("stream"));
}

}  // namespace flashtrain::bindings

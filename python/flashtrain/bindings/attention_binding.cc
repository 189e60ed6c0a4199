#include "python/flashtrain/bindings/attention_binding.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "flashtrain/attention/attention.h"
#include "python/flashtrain/bindings/call.h"
#include "python/flashtrain/bindings/tensor_arg.h"

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;

// Reads the tensors of a call into its params. Queries and keys are [batch, seqlen, heads,
// head_dim], or with cu_seqlens [total, heads, head_dim].
class AttentionOperands {
 public:
  AttentionOperands(AttentionParams& p, py::handle q, py::handle k, bool varlen)
      : p_(p), varlen_(varlen), q_("q", q), k_("k", k) {
    if (q_.is_cuda()) {
      throw std::invalid_argument("q: is on cuda; supported: cpu (on CUDA the op is in Triton)");
    }
    for (const TensorArg* arg : {&q_, &k_}) {
      if (arg->ndim() != (varlen ? 3 : 4)) {
        throw std::invalid_argument(
            std::string(arg == &q_ ? "q" : "k") + ": got " + std::to_string(arg->ndim()) +
            " dimensions; supported: " + (varlen ? "3 with cu_seqlens" : "4 without cu_seqlens"));
      }
    }
    p.dtype = q_.float_dtype();
    p.batch = varlen ? 0 : q_.size(0);
    p.max_seqlen_q = p.total_q = q_.size(varlen ? 0 : 1);
    p.max_seqlen_k = p.total_k = k_.size(varlen ? 0 : 1);
    p.num_heads = q_.size(q_.ndim() - 2);
    p.num_heads_k = k_.size(k_.ndim() - 2);
    p.head_dim = q_.size(q_.ndim() - 1);
  }

  void Queries(const char* name, py::handle object, AttentionTensor* tensor,
               bool is_written = false) {
    Heads(name, object, p_.num_heads, q_, tensor, is_written);
  }
  void Keys(const char* name, py::handle object, AttentionTensor* tensor, bool is_written = false) {
    Heads(name, object, p_.num_heads_k, k_, tensor, is_written);
  }

  // float32: [batch, heads, seqlen_q], or [heads, total_q].
  void Lse(py::handle object) {
    const TensorArg arg = Read("lse", object);
    if (varlen_) {
      arg.ExpectShape({p_.num_heads, p_.total_q});
    } else {
      arg.ExpectShape({p_.batch, p_.num_heads, p_.max_seqlen_q});
    }
    arg.ExpectElementType(ElementType::kFloat32);
    arg.ExpectContiguous();
    p_.lse = arg.data<float>();
    p_.lse_head_stride = p_.max_seqlen_q;
    p_.lse_batch_stride = p_.num_heads * p_.max_seqlen_q;
  }

  // int32 [batch + 1] each; sets batch.
  void Sequences(py::handle cu_seqlens_q, py::handle cu_seqlens_k) {
    if (!varlen_) return;
    const TensorArg q = Read("cu_seqlens_q", cu_seqlens_q);
    const TensorArg k = Read("cu_seqlens_k", cu_seqlens_k);
    if (q.ndim() != 1 || q.size(0) < 1) {
      throw std::invalid_argument("cu_seqlens_q: supported: int32 [batch + 1]");
    }
    for (const TensorArg* arg : {&q, &k}) {
      arg->ExpectShape({q.size(0)});
      arg->ExpectElementType(ElementType::kInt32);
      arg->ExpectContiguous();
    }
    p_.batch = q.size(0) - 1;
    p_.cu_seqlens_q = q.data<const int32_t>();
    p_.cu_seqlens_k = k.data<const int32_t>();
  }

  // float32, [heads] or [batch, heads].
  void AlibiSlopes(py::handle object) {
    if (object.is_none()) return;
    const TensorArg arg = Read("alibi_slopes", object);
    if (arg.ndim() == 1) {
      arg.ExpectShape({p_.num_heads});
    } else {
      arg.ExpectShape({p_.batch, p_.num_heads});
      p_.alibi_batch_stride = p_.num_heads;
    }
    arg.ExpectElementType(ElementType::kFloat32);
    arg.ExpectContiguous();
    p_.alibi_slopes = arg.data<const float>();
  }

  // {seed, offset}: int64 [2].
  void RngState(py::handle object) {
    if (object.is_none()) return;
    const TensorArg arg = Read("rng_state", object);
    arg.ExpectShape({2});
    arg.ExpectElementType(ElementType::kInt64);
    arg.ExpectContiguous();
    p_.rng_state = arg.data<const uint64_t>();
  }

  const TensorArg& first() const { return q_; }

 private:
  TensorArg Read(const char* name, py::handle object) {
    TensorArg arg(name, object);
    arg.ExpectSameDevice(q_);
    return arg;
  }

  void Heads(const char* name, py::handle object, int64_t heads, const TensorArg& like,
             AttentionTensor* tensor, bool is_written) {
    const TensorArg arg = Read(name, object);
    if (varlen_) {
      arg.ExpectShape({like.size(0), heads, p_.head_dim});
    } else {
      arg.ExpectShape({p_.batch, like.size(1), heads, p_.head_dim});
    }
    arg.ExpectFloat(p_.dtype);
    if (is_written) arg.ExpectNoOverlap();
    const int last = arg.ndim() - 1;
    bool empty = false;
    for (int i = 0; i <= last; ++i) empty |= arg.size(i) == 0;
    if (!empty && p_.head_dim > 1 && arg.stride(last) != 1) {
      throw std::invalid_argument(std::string(name) + ": got stride " +
                                  std::to_string(arg.stride(last)) +
                                  " in the last dimension; supported: 1");
    }
    tensor->data = arg.data();
    tensor->head_stride = arg.stride(last - 1);
    tensor->row_stride = arg.stride(last - 2);
    tensor->batch_stride = varlen_ ? 0 : arg.stride(0);
  }

  AttentionParams& p_;
  const bool varlen_;
  TensorArg q_, k_;
};

// The arguments after the tensors of heads, as both directions take them.
struct Options {
  py::handle lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state;
  int64_t max_seqlen_q, max_seqlen_k;
  float softmax_scale, softcap;
  int64_t window_left, window_right;
  float dropout_p;

  void Read(AttentionOperands& operands, AttentionParams& p) const {
    operands.Sequences(cu_seqlens_q, cu_seqlens_k);
    operands.Lse(lse);
    operands.AlibiSlopes(alibi_slopes);
    operands.RngState(rng_state);
    if (p.cu_seqlens_q != nullptr) {
      p.max_seqlen_q = max_seqlen_q;
      p.max_seqlen_k = max_seqlen_k;
    }
    p.softmax_scale = softmax_scale;
    p.softcap = softcap;
    p.window_left = window_left;
    p.window_right = window_right;
    p.dropout_p = dropout_p;
  }
};

void Forward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
             py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle alibi_slopes,
             py::handle rng_state, int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale,
             float softcap, int64_t window_left, int64_t window_right, float dropout_p) {
  AttentionForwardParams p;
  AttentionOperands operands(p, q, k, !cu_seqlens_q.is_none());
  const Options options{lse,       cu_seqlens_q, cu_seqlens_k, alibi_slopes,
                        rng_state, max_seqlen_q, max_seqlen_k, softmax_scale,
                        softcap,   window_left,  window_right, dropout_p};
  operands.Queries("q", q, &p.q);
  operands.Keys("k", k, &p.k);
  operands.Keys("v", v, &p.v);
  operands.Queries("out", out, &p.out, /*is_written=*/true);
  options.Read(operands, p);
  Call(operands.first(), [&](Device) { return AttentionForward(p); });
}

void Backward(py::handle dout, py::handle q, py::handle k, py::handle v, py::handle out,
              py::handle dq, py::handle dk, py::handle dv, py::handle lse, py::handle cu_seqlens_q,
              py::handle cu_seqlens_k, py::handle alibi_slopes, py::handle rng_state,
              int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale, float softcap,
              int64_t window_left, int64_t window_right, float dropout_p) {
  AttentionBackwardParams p;
  AttentionOperands operands(p, q, k, !cu_seqlens_q.is_none());
  const Options options{lse,       cu_seqlens_q, cu_seqlens_k, alibi_slopes,
                        rng_state, max_seqlen_q, max_seqlen_k, softmax_scale,
                        softcap,   window_left,  window_right, dropout_p};
  operands.Queries("q", q, &p.q);
  operands.Keys("k", k, &p.k);
  operands.Keys("v", v, &p.v);
  operands.Queries("out", out, &p.out);
  operands.Queries("dout", dout, &p.dout);
  operands.Queries("dq", dq, &p.dq, /*is_written=*/true);
  operands.Keys("dk", dk, &p.dk, /*is_written=*/true);
  operands.Keys("dv", dv, &p.dv, /*is_written=*/true);
  options.Read(operands, p);
  Call(operands.first(), [&](Device) { return AttentionBackward(p); });
}

}  // namespace

void RegisterAttention(py::module_& module) {
  using py::arg;
  module.def("attention_forward", &Forward, arg("q"), arg("k"), arg("v"), arg("out"), arg("lse"),
             arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("alibi_slopes"), arg("rng_state"),
             Integer("max_seqlen_q"), Integer("max_seqlen_k"), arg("softmax_scale"), arg("softcap"),
             Integer("window_left"), Integer("window_right"), arg("dropout_p"));
  module.def("attention_backward", &Backward, arg("dout"), arg("q"), arg("k"), arg("v"), arg("out"),
             arg("dq"), arg("dk"), arg("dv"), arg("lse"), arg("cu_seqlens_q"), arg("cu_seqlens_k"),
             arg("alibi_slopes"), arg("rng_state"), Integer("max_seqlen_q"),
             Integer("max_seqlen_k"), arg("softmax_scale"), arg("softcap"), Integer("window_left"),
             Integer("window_right"), arg("dropout_p"));
}

}  // namespace flashtrain::bindings

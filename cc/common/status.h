// Status: the result of a host function that can fail, in place of exceptions and aborts.
//
//   Status s = LayerNormForward(params, Device::Cuda(), stream);
//   if (!s.ok()) throw std::invalid_argument(s.message());
#pragma once

#include <string>
#include <utility>

namespace flashtrain {

enum class StatusCode {
  kOk,
  kInvalidArgument,  // the caller's arguments: dtype, size, stride, null pointer
  kUnavailable,      // this build or machine has no such device
  kInternal,         // the device reported an error
};

class Status {
 public:
  Status() = default;
  static Status InvalidArgument(std::string message) {
    return Status(StatusCode::kInvalidArgument, std::move(message));
  }
  static Status Unavailable(std::string message) {
    return Status(StatusCode::kUnavailable, std::move(message));
  }
  static Status Internal(std::string message) {
    return Status(StatusCode::kInternal, std::move(message));
  }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  // The same, with a function's name in front of a message about the caller's arguments.
  Status In(const char* function) const {
    if (code_ != StatusCode::kInvalidArgument) return *this;
    return InvalidArgument(std::string(function) + ": " + message_);
  }
  // One line: the argument's name, what came, what is supported. Empty when ok().
  const std::string& message() const { return message_; }

 private:
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace flashtrain

// Returns from the enclosing function when `expr` is not ok.
#define FLASHTRAIN_RETURN_IF_ERROR(expr)   \
  do {                                     \
    ::flashtrain::Status status_ = (expr); \
    if (!status_.ok()) return status_;     \
  } while (false)

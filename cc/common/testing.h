// A few lines in place of a test framework.
//
//   TEST(Name) { EXPECT(1 + 1 == 2) << "why"; }
//
// Link //cc/common:testing, whose main() runs every TEST and fails if one failed or none checked
// anything. An argument runs only the tests whose name contains it; --small makes IsSmallRun()
// true.
#pragma once

#include <memory>
#include <sstream>
#include <string>

namespace flashtrain::testing {

struct Registration {
  Registration(const char* name, void (*body)());
};

// One check; the message streamed into it is printed, and the test failed, if it does not hold.
class Check {
 public:
  Check(bool holds, const char* expression, const char* file, int line);
  ~Check();

  template <typename T>
  Check& operator<<(const T& value) {
    if (message_ != nullptr) *message_ << value;
    return *this;
  }

 private:
  std::unique_ptr<std::ostringstream> message_;  // null: it holds
};

// Whether long sweeps take fewer of their cases (--small): under a sanitizer a test runs ten to a
// hundred times slower. Every kernel is still launched, with rows and columns to spare.
bool IsSmallRun();

// Names what later checks of this scope are about, in their messages.
class Scope {
 public:
  explicit Scope(std::string text);
  ~Scope();
};

}  // namespace flashtrain::testing

#define EXPECT(condition) \
  ::flashtrain::testing::Check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)

#define TEST(name)                                                                        \
  static void Test##name();                                                               \
  static const ::flashtrain::testing::Registration registration##name(#name, Test##name); \
  static void Test##name()

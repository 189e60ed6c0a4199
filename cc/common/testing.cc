#include "flashtrain/common/testing.h"

#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

namespace flashtrain::testing {
namespace {

struct TestCase {
  const char* name;
  void (*body)();
};

std::vector<TestCase>& Tests() {
  static std::vector<TestCase> tests;
  return tests;
}

std::vector<std::string>& Scopes() {
  static std::vector<std::string> scopes;
  return scopes;
}

long checks = 0, failures = 0;
bool small_run = false;
constexpr long kMaxPrinted = 20;

}  // namespace

Registration::Registration(const char* name, void (*body)()) { Tests().push_back({name, body}); }

Check::Check(bool holds, const char* expression, const char* file, int line) {
  ++checks;
  if (holds) return;
  message_ = std::make_unique<std::ostringstream>();
  *message_ << file << ":" << line << ": expected " << expression << ": ";
}

Check::~Check() {
  if (message_ == nullptr || ++failures > kMaxPrinted) return;
  std::fprintf(stderr, "%s", message_->str().c_str());
  for (const std::string& scope : Scopes()) std::fprintf(stderr, " [%s]", scope.c_str());
  std::fprintf(stderr, "\n");
}

bool IsSmallRun() { return small_run; }

Scope::Scope(std::string text) { Scopes().push_back(std::move(text)); }
Scope::~Scope() { Scopes().pop_back(); }

int RunTests(int argc, char** argv) {
  const char* filter = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") == 0) {
      small_run = true;
    } else if (argv[i][0] == '-' || filter != nullptr) {
      std::fprintf(stderr, "%s: unknown argument \"%s\"; supported: [--small] [part of a name]\n",
                   argv[0], argv[i]);
      return 2;
    } else {
      filter = argv[i];
    }
  }
  int passed = 0, failed = 0;
  for (const TestCase& test : Tests()) {
    if (filter != nullptr && std::strstr(test.name, filter) == nullptr) continue;
    const long checks_before = checks, failures_before = failures;
    test.body();
    const bool ok = failures == failures_before && checks > checks_before;
    if (checks == checks_before) std::fprintf(stderr, "%s checked nothing\n", test.name);
    std::printf("%s %s (%ld checks)\n", ok ? "PASS" : "FAIL", test.name, checks - checks_before);
    ++(ok ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return passed > 0 && failed == 0 ? 0 : 1;
}

}  // namespace flashtrain::testing

int main(int argc, char** argv) { return flashtrain::testing::RunTests(argc, argv); }

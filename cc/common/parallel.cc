#include "flashtrain/common/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "flashtrain/common/openmp.h"

namespace flashtrain {
namespace {

std::atomic<int> num_threads{0};  // 0: not set

class ThreadPool {
 public:
  ~ThreadPool() { Resize(0); }

  // False when another call is using the pool.
  bool TryRun(int64_t num_tasks, const std::function<void(int64_t)>& task, int num_workers) {
    std::unique_lock<std::mutex> call(call_mutex_, std::try_to_lock);
    if (!call.owns_lock()) return false;
    if (num_workers != num_workers_) Resize(num_workers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      num_tasks_ = num_tasks;
      next_task_.store(0, std::memory_order_relaxed);
      running_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    start_.notify_all();
    RunTasks(task, num_tasks);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void Resize(int num_workers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_ = false;
    num_workers_ = 0;  // where what follows throws, the next call tries again
    workers_.reserve(num_workers);
    try {
      for (int i = 0; i < num_workers; ++i) {
        workers_.emplace_back([this, seen = generation_] { WorkerLoop(seen); });
      }
    } catch (const std::system_error&) {
      // The system refuses more threads: fewer do all tasks, too.
    }
    num_workers_ = num_workers;
  }

  void RunTasks(const std::function<void(int64_t)>& task, int64_t num_tasks) {
    for (int64_t i; (i = next_task_.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(i);
  }

  void WorkerLoop(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      start_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      const std::function<void(int64_t)>& task = *task_;
      const int64_t num_tasks = num_tasks_;
      lock.unlock();
      RunTasks(task, num_tasks);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex call_mutex_;  // held by the one call that uses the pool
  std::mutex mutex_;       // guards what follows
  std::condition_variable start_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t num_tasks_ = 0;
  std::atomic<int64_t> next_task_{0};
  int running_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
  int num_workers_ = 0;  // asked for; the system may have refused some
  std::vector<std::thread> workers_;
};

// The first exception of a call's tasks, carried from the thread that met it to the caller's.
class FirstException {
 public:
  bool caught() const { return caught_.load(std::memory_order_relaxed); }
  void Catch() {
    if (!caught_.exchange(true)) exception_ = std::current_exception();
  }
  // After all threads are done.
  void Rethrow() const {
    if (exception_ != nullptr) std::rethrow_exception(exception_);
  }

 private:
  std::atomic<bool> caught_{false};
  std::exception_ptr exception_;
};

std::atomic<ThreadPool*> pool{nullptr};
std::mutex pool_mutex;

// The child has the pool's memory but none of its threads, and its mutexes may be held by threads
// that no longer exist: leave it behind and start afresh.
void ForgetPoolInForkedChild() {
  pool.store(nullptr);
  new (&pool_mutex) std::mutex();
}

// Never destroyed: other static destructors may still run ops.
ThreadPool& GetPool() {
  ThreadPool* current = pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool.load() == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, ForgetPoolInForkedChild);
    static_cast<void>(registered);
    pool.store(new ThreadPool(), std::memory_order_release);
  }
  return *pool.load();
}

thread_local bool inside_task = false;

void RunInline(int64_t num_tasks, const std::function<void(int64_t)>& task) {
  for (int64_t i = 0; i < num_tasks; ++i) task(i);
}

}  // namespace

void SetNumThreads(int n) { num_threads.store(std::clamp(n, 1, kMaxThreads)); }

int GetNumThreads() {
  const int n = num_threads.load();
  if (n > 0) return n;
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

void ParallelFor(int64_t num_tasks, const std::function<void(int64_t)>& task) {
  const int threads = GetNumThreads();
  if (num_tasks <= 1 || threads <= 1 || inside_task) return RunInline(num_tasks, task);
  FirstException first;
  const std::function<void(int64_t)> guarded = [&task, &first](int64_t i) {
    if (first.caught()) return;
    inside_task = true;
    try {
      task(i);
    } catch (...) {
      first.Catch();
    }
    inside_task = false;
  };
  if (!RunOnOpenMp(num_tasks, guarded, threads) &&
      !GetPool().TryRun(num_tasks, guarded, threads - 1)) {
    return RunInline(num_tasks, task);
  }
  first.Rethrow();
}

float* ThreadScratch(int64_t count) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t capacity = 0;
  constexpr int64_t kMaxCount = int64_t{1} << 48;
  if (count < 0 || count > kMaxCount) throw std::bad_alloc();
  if (count > capacity) {
    capacity = 0;  // with the memory, so that a call after one that fails does not trust it
    buffer.reset();
    constexpr int64_t kAlign = 64;
    const int64_t bytes =
        (count * static_cast<int64_t>(sizeof(float)) + kAlign - 1) / kAlign * kAlign;
    buffer.reset(static_cast<float*>(std::aligned_alloc(kAlign, bytes)));
    if (buffer == nullptr) throw std::bad_alloc();
    capacity = count;
  }
  return buffer.get();
}

}  // namespace flashtrain

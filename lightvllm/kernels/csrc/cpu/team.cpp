#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lightvllm {
namespace {

// A helper looks for the next kernel for so long before it sleeps: longer than Python takes between two of them.
constexpr std::chrono::microseconds PATIENCE{100};
constexpr int SPINS = 64;  // between two looks at the clock

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};

class Team {
  public:
    static constexpr int MOST = 256;  // threads

    void run(int64_t pieces, int threads, Piece piece, const void* context) {
        std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
        if (!lock) {
            for (int64_t i = 0; i < pieces; i++) piece(context, i);
            return;
        }
        hire(threads - 1);
        piece_ = piece;
        context_ = context;
        crew_ = threads;
        for (int64_t i = 0; i < threads; i++) {
            shares_[i].next.store(pieces * i / threads, std::memory_order_relaxed);
            shares_[i].end = pieces * (i + 1) / threads;
        }
        open_.store(true);
        call_.fetch_add(1);
        call_.notify_all();
        work(0);
        // From here on nobody enters; those inside each finish the piece that they are at.
        open_.store(false);
        for (int i = 0; inside_.load() != 0; i++) {
            if (i < 16 * SPINS)
                pause();
            else
                std::this_thread::yield();  // a helper may be waiting for this very core
        }
    }

  private:
    // Each has a share of pieces that lie side by side, and helps the others when it is done with its own.
    void work(int number) {
        for (int k = 0; k < crew_; k++) {
            Share& share = shares_[(number + k) % crew_];
            for (int64_t i; (i = share.next.fetch_add(1)) < share.end;) piece_(context_, i);
        }
    }

    void hire(int count) {
        try {
            for (; helpers_ < count; helpers_++) std::thread(&Team::help, this, helpers_ + 1, call_.load()).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: those that there are do the work.
        }
    }

    void help(int number, uint32_t seen) {
        for (;;) {
            auto until = std::chrono::steady_clock::now() + PATIENCE;
            while (call_.load(std::memory_order_relaxed) == seen) {
                for (int i = 0; i < SPINS; i++) pause();
                if (std::chrono::steady_clock::now() > until) {
                    call_.wait(seen);
                    break;
                }
            }
            seen = call_.load();
            inside_.fetch_add(1);
            // Open, and counted as inside: the caller waits, so what it has published stays valid.
            if (open_.load() && number < crew_) work(number);
            inside_.fetch_sub(1);
        }
    }

    std::mutex busy_;  // held by the caller
    int helpers_ = 0;
    Piece piece_ = nullptr;
    const void* context_ = nullptr;
    int crew_ = 0;  // the caller, number 0, and helpers from 1 on
    Share shares_[MOST];
    alignas(64) std::atomic<uint32_t> call_{0};  // counts the jobs; helpers sleep on it
    std::atomic<bool> open_{false};
    alignas(64) std::atomic<int> inside_{0};
};

// Never destroyed: its helpers run until the process ends. A forked child has none of them, and gets a team of its own.
std::atomic<Team*> team{nullptr};

}  // namespace

void run_pieces(int64_t pieces, int threads, Piece piece, const void* context) {
    static const bool once = [] {
        team.store(new Team);
        pthread_atfork(nullptr, nullptr, [] { team.store(new Team); });
        return true;
    }();
    (void)once;
    team.load()->run(pieces, static_cast<int>(std::min<int64_t>({threads, pieces, Team::MOST})), piece, context);
}

}  // namespace lightvllm

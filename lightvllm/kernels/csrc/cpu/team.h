// Runs the pieces of a kernel on several threads.
//
// Not OpenMP's, because its threads meet at a barrier after every region: one that the system has put aside (a busy
// machine, a CPU quota) then holds the others up for a time slice, and a decode step has some three hundred regions.
// Here the caller takes pieces itself until none is left, and waits only for pieces that are being worked on.
#pragma once

#include <cstdint>

namespace lightvllm {

using Piece = void (*)(const void* context, int64_t piece);

// Calls piece(context, i) once for each i of [0, pieces), on up to `threads` threads, and returns when all are done.
// If another caller has the team at the moment, the caller does all of it.
void run_pieces(int64_t pieces, int threads, Piece piece, const void* context);

template <typename F>
void parallel(int64_t pieces, int threads, const F& f) {
    if (threads > 1 && pieces > 1) {
        run_pieces(pieces, threads, [](const void* g, int64_t i) { (*static_cast<const F*>(g))(i); }, &f);
    } else {
        for (int64_t i = 0; i < pieces; i++) f(i);
    }
}

}  // namespace lightvllm

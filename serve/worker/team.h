// Threads: those of the OpenMP runtime that the process has loaded, so that there are never two teams.
//
// The library is built without OpenMP. Whoever loads it hands over four functions of the runtime that
// torch uses (the interface that GCC's libgomp and LLVM's libiomp5 share); without them all is done by
// the thread that calls.

#pragma once

namespace deltamux {

struct Team {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags) = nullptr;
    void (*barrier)() = nullptr;
    int (*thread)() = nullptr;
    int (*most_threads)() = nullptr;
};

inline Team team;

struct Member {
    int index, count;

    void wait() const {
        if (count > 1) team.barrier();
    }
};

template <typename Job>
struct Shared {
    Job *job;
    int threads;

    static void start(void *data) {
        Shared *shared = static_cast<Shared *>(data);
        shared->job->work({shared->threads > 1 ? team.thread() : 0, shared->threads});
    }
};

// Runs job.work(member) on every thread of the team.
template <typename Job>
void run(Job &job) {
    int threads = team.parallel ? team.most_threads() : 1;
    Shared<Job> shared{&job, threads};
    if (threads > 1) {
        team.parallel(Shared<Job>::start, &shared, unsigned(threads), 0);
    } else {
        Shared<Job>::start(&shared);
    }
}

}  // namespace deltamux

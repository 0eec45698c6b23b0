// Memory that is kept from call to call: it grows, and every part of it is aligned for any vector.

#pragma once

#include <cstddef>
#include <cstdlib>

namespace deltamux {

class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    ~Scratch() { std::free(data_); }

    // Makes room; what was taken before is no longer valid.
    void reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + PAGE - 1) / PAGE * PAGE;
            data_ = static_cast<char *>(std::aligned_alloc(ALIGNMENT, size_));
            if (!data_) std::abort();
        }
        used_ = 0;
    }

    template <typename T>
    static size_t room(size_t count) {
        return (count * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }

    template <typename T>
    T *take(size_t count) {
        T *start = reinterpret_cast<T *>(data_ + used_);
        used_ += room<T>(count);
        return start;
    }

  private:
    static constexpr size_t ALIGNMENT = 64, PAGE = 4096;
    char *data_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

}  // namespace deltamux

#include "framework/base/file.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <ostream>
#include <streambuf>
#include <string>
#include <system_error>
#include <utility>

#include "framework/base/error.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

const char* remedy(int reason) {
  switch (reason) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return "free some space or choose another folder";
    case EACCES:
    case EPERM:
    case EROFS:
      return "choose a folder that you may write to";
    case ENAMETOOLONG:
      return "choose a shorter name";
    default:
      return "choose another path";
  }
}

[[noreturn]] void fail(const fs::path& path, int reason) {
  throw Error("cannot write {}: {}; {}", path.string(), std::generic_category().message(reason),
              remedy(reason));
}

class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int number() const { return number_; }
  // Some file systems report a failed write only here.
  int close() { return ::close(std::exchange(number_, -1)); }

 private:
  int number_;
};

// std::ofstream does not keep errno, and the message needs it.
class DescriptorBuffer : public std::streambuf {
 public:
  explicit DescriptorBuffer(int number) : number_(number) {
    setp(buffer_.data(), buffer_.data() + buffer_.size());
  }

  int reason() const { return reason_; }

 protected:
  int_type overflow(int_type c) override {
    if (!drain()) return traits_type::eof();
    if (!traits_type::eq_int_type(c, traits_type::eof())) sputc(traits_type::to_char_type(c));
    return traits_type::not_eof(c);
  }

  int sync() override { return drain() ? 0 : -1; }

 private:
  bool drain() {
    const char* from = pbase();
    while (from < pptr()) {
      const ssize_t written = ::write(number_, from, static_cast<size_t>(pptr() - from));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) {
        reason_ = written < 0 ? errno : EIO;
        return false;
      }
      from += written;
    }
    setp(buffer_.data(), buffer_.data() + buffer_.size());
    return true;
  }

  int number_;
  int reason_ = 0;
  std::array<char, 1 << 16> buffer_;
};

}  // namespace

AtomicPath::AtomicPath(const fs::path& path) : path_(path) {
  static std::atomic<int> count{0};
  if (path.filename().empty()) {
    throw Error("cannot write '{}': it names no file; give a file name", path.string());
  }
  std::error_code ignored;
  if (fs::is_symlink(path, ignored)) {
    const fs::path target = fs::weakly_canonical(path, ignored);
    if (!target.empty()) path_ = target;
  }
  const fs::file_status status = fs::status(path_, ignored);
  if (fs::is_directory(status)) {
    throw Error("cannot write {}: it is a folder; name a file in it", path.string());
  }
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    throw Error("cannot write {}: it is a device or a pipe; name an ordinary file", path.string());
  }
  const fs::path folder = path_.has_parent_path() ? path_.parent_path() : fs::path(".");
  if (!fs::is_directory(folder, ignored)) {
    throw Error("cannot write {}: there is no folder {}; create it first", path.string(),
                folder.string());
  }
  temporary_ = path_;
  temporary_ += fmt::format(".{}-{}.partial", ::getpid(), count++);
  Descriptor file(::open(temporary_.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666));
  if (file.number() < 0) fail(path_, errno);
}

AtomicPath::~AtomicPath() {
  if (!committed_) ::unlink(temporary_.c_str());
}

void AtomicPath::reserve(uint64_t bytes) {
  Descriptor file(::open(temporary_.c_str(), O_WRONLY | O_CLOEXEC));
  if (file.number() < 0) fail(path_, errno);
  const int reason = ::posix_fallocate(file.number(), 0, static_cast<off_t>(bytes));
  if (reason != 0) fail(path_, reason);
}

void AtomicPath::commit() {
  SIKV_ASSERT(!committed_);
  Descriptor file(::open(temporary_.c_str(), O_WRONLY | O_CLOEXEC));
  if (file.number() < 0) fail(path_, errno);
  if (::fsync(file.number()) != 0) fail(path_, errno);
  if (file.close() != 0) fail(path_, errno);
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, errno);
  committed_ = true;
  // The name itself survives a power cut only once the folder is synced. Best effort: some file
  // systems refuse, and the file is complete either way.
  const fs::path folder = path_.has_parent_path() ? path_.parent_path() : fs::path(".");
  Descriptor entry(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (entry.number() >= 0) ::fsync(entry.number());
}

void write_atomically(const fs::path& path, const std::function<void(std::ostream&)>& write) {
  AtomicPath target(path);
  {
    Descriptor file(::open(target.temporary().c_str(), O_WRONLY | O_CLOEXEC));
    if (file.number() < 0) fail(path, errno);
    DescriptorBuffer buffer(file.number());
    std::ostream stream(&buffer);
    stream.exceptions(std::ios::badbit);
    try {
      write(stream);
      stream.flush();
    } catch (const std::ios_base::failure&) {
      if (buffer.reason() == 0) throw;
      fail(path, buffer.reason());
    }
    if (file.close() != 0) fail(path, errno);
  }
  target.commit();
}

}  // namespace sikv

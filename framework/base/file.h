// Files that exist whole or not at all: written under a temporary name beside the target, synced to
// disk, then renamed over it. A failure or an exception removes the temporary and leaves an older
// file of that name as it was.
//
// Every failure is an Error that names the path, the reason and a remedy.
#ifndef SIKV_FRAMEWORK_BASE_FILE_H_
#define SIKV_FRAMEWORK_BASE_FILE_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <iosfwd>

namespace sikv {

// Calls write(stream) and publishes what it wrote. The stream throws when the disk refuses, so that
// `write` need not check it.
void write_atomically(const std::filesystem::path& path,
                      const std::function<void(std::ostream&)>& write);

// The same for libraries that open files themselves (HDF5). The constructor creates an empty
// temporary, so that an unwritable folder is found before the work is done.
class AtomicPath {
 public:
  // A symbolic link is followed: its target is replaced, not the link. Devices and folders are
  // refused.
  explicit AtomicPath(const std::filesystem::path& path);
  ~AtomicPath();
  AtomicPath(const AtomicPath&) = delete;
  AtomicPath& operator=(const AtomicPath&) = delete;

  // "<path>.<process>-<count>.partial"; closed by its user before commit().
  const std::filesystem::path& temporary() const { return temporary_; }

  // Grows the temporary to at least `bytes`, on disk: a library that does not survive a full disk
  // (HDF5 crashes at exit) then never meets one. Its user cuts the file to size in the end.
  void reserve(uint64_t bytes);

  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  bool committed_ = false;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_BASE_FILE_H_

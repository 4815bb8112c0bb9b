#include "framework/base/file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <iterator>
#include <ostream>
#include <stdexcept>
#include <string>

#include "framework/base/error.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "sikv-file-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  static std::string content(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  int entries() const {
    return static_cast<int>(std::distance(fs::directory_iterator(folder_), {}));
  }
  static std::string failure(const fs::path& path) {
    try {
      write_atomically(path, [](std::ostream& out) { out << "x"; });
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  fs::path folder_;
};

TEST_F(FileTest, WritesAndReplaces) {
  const fs::path path = folder_ / "a.json";
  write_atomically(path, [](std::ostream& out) { out << "first"; });
  EXPECT_EQ(content(path), "first");
  const std::string large(300000, 'x');
  write_atomically(path, [&](std::ostream& out) { out << large << std::endl; });
  EXPECT_EQ(content(path), large + "\n");
  EXPECT_EQ(entries(), 1);
}

TEST_F(FileTest, ExceptionLeavesTheOldFileAndNoTemporary) {
  const fs::path path = folder_ / "a.json";
  write_atomically(path, [](std::ostream& out) { out << "old"; });
  EXPECT_THROW(write_atomically(path,
                                [](std::ostream& out) {
                                  out << std::string(200000, 'y');
                                  throw std::runtime_error("stop");
                                }),
               std::runtime_error);
  EXPECT_EQ(content(path), "old");
  EXPECT_EQ(entries(), 1);
}

TEST_F(FileTest, FullDiskIsAnErrorWithRemedy) {
  // A limit on the file's size stands in for a full disk: the kernel refuses the same way.
  struct rlimit old;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  struct rlimit small = {100000, old.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  std::string text = "no error";
  try {
    write_atomically(folder_ / "a.bin", [](std::ostream& out) {
      for (int i = 0; i < 300; ++i) out << std::string(1000, 'z');
    });
  } catch (const Error& error) {
    text = error.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(text.find("cannot write " + (folder_ / "a.bin").string()), std::string::npos) << text;
  EXPECT_NE(text.find("free some space"), std::string::npos) << text;
  EXPECT_EQ(entries(), 0);
}

TEST_F(FileTest, SentencesNamePathReasonAndRemedy) {
  EXPECT_EQ(
      failure(folder_ / "none" / "a.json"),
      fmt::format("cannot write {0}/none/a.json: there is no folder {0}/none; create it first",
                  folder_.string()));
  EXPECT_EQ(failure(folder_),
            fmt::format("cannot write {}: it is a folder; name a file in it", folder_.string()));
  EXPECT_EQ(failure("/dev/null"),
            "cannot write /dev/null: it is a device or a pipe; name an ordinary file");
  EXPECT_EQ(failure(""), "cannot write '': it names no file; give a file name");
  EXPECT_NE(failure(folder_ / std::string(300, 'n')).find("choose a shorter name"),
            std::string::npos);
}

TEST_F(FileTest, UnwritableFolder) {
  ASSERT_EQ(::chmod(folder_.c_str(), 0555), 0);
  // Root may write everywhere: for a while it is nobody.
  const uid_t user = ::geteuid();
  constexpr uid_t kNobody = 65534;
  if (user == 0) {
    ASSERT_EQ(::seteuid(kNobody), 0);
  }
  const std::string said = failure(folder_ / "a");
  if (user == 0) {
    ASSERT_EQ(::seteuid(user), 0);
  }
  EXPECT_NE(said.find("choose a folder that you may write to"), std::string::npos) << said;
  ::chmod(folder_.c_str(), 0755);
}

TEST_F(FileTest, SymbolicLinkStays) {
  write_atomically(folder_ / "real", [](std::ostream& out) { out << "1"; });
  fs::create_symlink("real", folder_ / "link");
  write_atomically(folder_ / "link", [](std::ostream& out) { out << "2"; });
  EXPECT_TRUE(fs::is_symlink(folder_ / "link"));
  EXPECT_EQ(content(folder_ / "real"), "2");
}

TEST_F(FileTest, AtomicPathRemovesWhatIsNotCommitted) {
  {
    AtomicPath path(folder_ / "a.h5");
    EXPECT_TRUE(fs::exists(path.temporary()));
    EXPECT_EQ(path.temporary().parent_path(), folder_);
  }
  EXPECT_EQ(entries(), 0);
  AtomicPath path(folder_ / "a.h5");
  std::ofstream(path.temporary()) << "data";
  path.commit();
  EXPECT_EQ(content(folder_ / "a.h5"), "data");
  EXPECT_EQ(entries(), 1);
}

TEST_F(FileTest, ReserveKeepsWhatIsThere) {
  AtomicPath path(folder_ / "a.h5");
  std::ofstream(path.temporary()) << "data";
  path.reserve(10000);
  EXPECT_EQ(fs::file_size(path.temporary()), 10000u);
  path.reserve(100);
  EXPECT_EQ(content(path.temporary()).substr(0, 5), std::string("data\0", 5));
}

TEST_F(FileTest, RelativeName) {
  const fs::path before = fs::current_path();
  fs::current_path(folder_);
  write_atomically("plain", [](std::ostream& out) { out << "3"; });
  fs::current_path(before);
  EXPECT_EQ(content(folder_ / "plain"), "3");
}

}  // namespace
}  // namespace sikv

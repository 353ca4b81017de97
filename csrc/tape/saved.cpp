#include "tape/saved.h"

#include <c10/util/Exception.h>

#include "tape/tape.h"

namespace wengert::tape {

namespace {

namespace autograd = torch::autograd;
using autograd::SavedVariable;

// PyTorch guards what a node saved by a mutex that only classes derived from Node can name.
class SavedBy : public autograd::Node {
 public:
  static std::unique_lock<std::mutex> locked(autograd::Node& fn) { return std::unique_lock(fn.*(&SavedBy::mutex_)); }
};

void check_saved(const SavedVariable& saved) {
  if (saved.has_hooks()) throw Unsupported("saved tensors with hooks");
}

}  // namespace

std::unique_lock<std::mutex> lock_saved(autograd::Node& fn) { return SavedBy::locked(fn); }

at::Tensor unpack(const NodePtr& fn, const SavedVariable& saved, bool is_result) {
  const auto lock = SavedBy::locked(*fn);
  check_saved(saved);
  return is_result ? saved.unpack(fn) : saved.unpack();
}

std::vector<at::Tensor> unpack(const NodePtr& fn, const std::vector<SavedVariable>& saved, const bool& released) {
  const auto lock = SavedBy::locked(*fn);
  TORCH_CHECK(!released, autograd::ERR_BACKWARD_TWICE);
  std::vector<at::Tensor> tensors;
  for (const SavedVariable& one : saved) {
    check_saved(one);
    tensors.push_back(one.unpack());
  }
  return tensors;
}

}  // namespace wengert::tape

// Operators for which PyTorch's vmap has no rule, as it has them for what they are made of: recurrent nets and their cells,
// attention on the CPU, bags of embeddings.  PyTorch calls them sample by sample instead, or not at all (a state that starts as
// zeros).
#pragma once

namespace wengert::ops {

// While one lives, this thread's calls of them under torch.func's vmap are compositions.
class Composing {
 public:
  Composing();
  ~Composing();
  Composing(const Composing&) = delete;
  Composing& operator=(const Composing&) = delete;

 private:
  bool outer_;
};

}  // namespace wengert::ops

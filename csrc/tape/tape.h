// The autograd graph below some outputs, down to some inputs, read once into plain data.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/key.h"
#include "common/node_ptr.h"
#include "fused/program.h"
#include "tape/operators.h"

namespace wengert::tape {

using common::NodePtr;

// Thrown when the call has to take PyTorch's own path as a whole; what() is the reason, for stats and explain.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A value of the forward computation: output `output` of tape node `node` (that is, a gradient edge of PyTorch).
struct Value {
  std::int32_t node = -1;
  std::int32_t output = 0;
  bool operator==(const Value&) const = default;
};

struct Meta {
  Shape shape;
  at::ScalarType dtype = at::kFloat;
  bool complex = false;  // a complex value, shown as its pairs of reals: see NOTE [Complex values]
};

struct Reader;  // one row of the reader table: node name, how to read it, how to describe it

struct Node {
  const Reader* reader = nullptr;  // never null; nodes without a row of their own share the opaque row
  NodePtr fn;
  // The parameters of the row (see parameters.h).  Few of each in most nodes; allocating them would cost as much as reading the
  // node.
  c10::SmallVector<std::int64_t, 6> ints;
  c10::SmallVector<double, 2> reals;
  c10::SmallVector<std::int32_t, 4> slots;        // saved tensors, -1 where absent or not needed
  std::shared_ptr<const fused::Program> program;  // nodes of wengert::fused only
  c10::SmallVector<Value, 3> inputs;              // one per next edge; node = -1 where no requested input is reached through it
  c10::SmallVector<Meta, 1> outputs;              // one per output of the forward op

  void clear();  // keeps its memory
};

struct TapeContents {
  at::Device device = at::kCPU;    // of all its tensors, but for saved scalars: PyTorch keeps Python numbers on the CPU
  bool custom = false;             // a node is a custom Function, which runs the user's code
  std::vector<NodePtr> rewritten;  // composed ops that the nodes stand for
  std::vector<Node> nodes;         // a node stands before all nodes it leads to; leaves are nodes with no inputs
  std::vector<at::Tensor>
      slots;                   // distinct saved tensors (same storage, geometry and dtype = same slot), with their grad history
  std::vector<Value> outputs;  // of the requested outputs; node = -1 where an output does not require grad
  std::vector<Value> inputs;   // of the requested inputs; node = -1 where no output reaches it
  common::Key signature;       // equal signatures = same plan: everything above except tensor data and node identity
};

// In memory that the next tape of the thread takes over, the lists of its nodes included.
struct Tape : TapeContents {
  Tape();
  ~Tape();
  Tape(Tape&&) = default;
  Tape& operator=(Tape&&) = delete;
};

// Reads the graph.  Unpacks each saved tensor once (which performs PyTorch's own version and freed-buffer checks).
// Throws Unsupported for what the engine must not walk; PyTorch's own errors pass through.  `one_row`: a gradient is asked for,
// so that nodes whose structure only many rows pay for may stay opaque.
Tape capture(at::TensorList outputs, at::TensorList inputs, bool one_row);

// Throws Unsupported for what the engine's kernels cannot read: all but plain strided tensors of real numbers.
void check_tensor(const at::Tensor& tensor);

// Of each output, whether its graph reaches a leaf that is not one of the inputs: a captured parameter, say.  Nodes that this
// thread made before, whose sequence numbers are below `begun`, do: the inputs were made afterwards.
std::vector<bool> have_other_leaves(at::TensorList outputs, at::TensorList inputs, at::TensorList attached, std::uint64_t begun);

// Frees the buffers of every walked node, as the engine does with retain_graph=False.
void release(Tape& tape);

// The operator from output `output` to next edge `input` of a node; factor expressions are built in `pool`.
Pullback describe(const Tape& tape, const Node& node, int output, int input, fused::ExprPool& pool);

const char* name(const Node& node);  // PyTorch's name of the node, e.g. "MulBackward0"

}  // namespace wengert::tape

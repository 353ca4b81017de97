// The stream that a graph runs on.
//
// NOTE [Streams]
// PyTorch runs a backward node on the stream its forward ran on, and the caller's stream waits for it at the end.  So it is here:
// a call runs on the stream of its graph, behind what the caller has queued.  Saved tensors are then read, and freed, in the
// order of the stream they were saved for, and what is recorded with create_graph belongs to that stream too.  What the caller
// gave or gets is marked as used on the other stream, so that the allocator keeps it for as long. A graph of several streams is
// PyTorch's.  While the caller's stream captures a CUDA graph, only nodes of that capture count: other streams cannot be waited
// for, and what they did lies before every replay.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>
#include <utility>

namespace wengert::ops {

// Makes a stream the current one of this thread until it is destroyed; the caller's waits for it then.
class GraphStream {
 public:
  GraphStream() = default;
  GraphStream(GraphStream&& other) noexcept : streams_(std::exchange(other.streams_, std::nullopt)) {}
  GraphStream& operator=(GraphStream&&) = delete;
  ~GraphStream();

  void enter(c10::Stream stream);
  void given(at::TensorList tensors) const;     // by the caller, to be used here
  void returned(at::TensorList tensors) const;  // made here, for the caller

 private:
  struct Streams {
    c10::Stream caller, graph;
  };
  std::optional<Streams> streams_;  // none: both are one
};

c10::Stream current_stream(at::Device device);

}  // namespace wengert::ops

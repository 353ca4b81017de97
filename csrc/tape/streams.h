// Which stream a graph belongs to; see NOTE [Streams].
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>

namespace wengert::tape {

// The stream of the nodes that a call would run or read, where it is not the current one.  Throws Unsupported where there are
// several.
std::optional<c10::Stream> foreign_stream(at::TensorList outputs, at::TensorList inputs);

}  // namespace wengert::tape

#include "ops/graph_stream.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

namespace wengert::ops {
namespace {

using c10::impl::VirtualGuardImpl;

void wait(const c10::Stream& waiting, const c10::Stream& other) {
  c10::Event event(other.device_type());
  event.record(other);
  event.block(waiting);
}

void record(at::TensorList tensors, const c10::Stream& stream) {
  const VirtualGuardImpl impl(stream.device_type());
  for (const at::Tensor& tensor : tensors) {
    if (tensor.defined() && tensor.device() == stream.device()) impl.recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
  }
}

}  // namespace

void GraphStream::enter(c10::Stream stream) {
  const VirtualGuardImpl impl(stream.device_type());
  const c10::Stream caller = impl.getStream(stream.device());
  wait(stream, caller);
  impl.exchangeStream(stream);
  streams_ = {.caller = caller, .graph = stream};
}

GraphStream::~GraphStream() {
  if (!streams_) return;
  VirtualGuardImpl(streams_->caller.device_type()).exchangeStream(streams_->caller);
  try {
    wait(streams_->caller, streams_->graph);
  } catch (const std::exception& error) {  // the device has failed, as whatever comes next will say
    TORCH_WARN("wengert: the caller's stream cannot wait for the graph's. ", error.what());
  }
}

void GraphStream::given(at::TensorList tensors) const {
  if (streams_) record(tensors, streams_->graph);
}

void GraphStream::returned(at::TensorList tensors) const {
  if (streams_) record(tensors, streams_->caller);
}

c10::Stream current_stream(at::Device device) { return VirtualGuardImpl(device.type()).getStream(device); }

}  // namespace wengert::ops

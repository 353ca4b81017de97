// What surrounds a call and keeps it off the engine.
#pragma once

namespace wengert::tape {

// Why no graph can be captured on this thread at this moment (anomaly mode, autocast, tracing, ...), or null.
const char* ambient_refusal();

}  // namespace wengert::tape

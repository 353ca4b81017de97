// Memory that a plan takes, in bytes, its programs included.
#pragma once
#include <cstddef>

#include "blocks/plan.h"

namespace wengert::blocks {

std::size_t footprint(const Plan& plan);

}  // namespace wengert::blocks

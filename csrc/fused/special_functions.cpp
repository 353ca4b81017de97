#include "fused/special_functions.h"  // the definitions themselves

// Grid, what is known of a scalar format: for grid.cpp, and for update.cpp, which rounds sums of its own.
#pragma once

#include <cstdint>

namespace {

// Mirrors GridPlan in grid.py, field by field.
struct GridPlan {
  int32_t emin, mantissa;  // of a float
  int32_t is_even;         // spacing 1 everywhere: an integer format
  int32_t is_signed;       // tables: of positive values alone it is not
  int32_t mode;            // 0 nearest_even, 1 nearest_away, 2 toward_zero, 3 stochastic
  int32_t has_top;         // whether what lies beyond becomes `top`, else it saturates
  int32_t has_tie;         // whether `tie` decides below `gap`
  int32_t has_negative_zero;
  double gap;   // the smallest value of a format with nothing between it and 0, else 0
  double tie;   // what lies above it, below `gap`, goes up
  double min, max, top;
  int64_t count;        // of the table's values, one past each end among them; 0: no table
  const double* table;  // behind them Inf, up to a power of two
};

enum Mode { kEven, kAway, kZero, kStochastic };

}  // namespace

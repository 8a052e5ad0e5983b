// SPDX-License-Identifier: BSD-3-Clause
// Tests that run under several schedules, and how those are named.
#pragma once

#include <gtest/gtest.h>

#include <ostream>
#include <string>

#include "launch.h"

namespace resnorm::simt {

inline std::string name_of(const Schedule& schedule) {
  switch (schedule.order) {
    case Order::kForward:
      return "forward";
    case Order::kReverse:
      return "reverse";
    default:
      return "random" + std::to_string(schedule.seed);
  }
}

inline void PrintTo(const Schedule& schedule, std::ostream* out) { *out << name_of(schedule); }

inline std::string name_of_parameter(const ::testing::TestParamInfo<Schedule>& info) { return name_of(info.param); }

#define RESNORM_FOR_SCHEDULES(Suite, schedules) \
  INSTANTIATE_TEST_SUITE_P(Schedule, Suite, ::testing::ValuesIn(schedules), ::resnorm::simt::name_of_parameter)

}  // namespace resnorm::simt

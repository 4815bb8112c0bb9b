// sikv dataset: looks into traces, makes synthetic ones, checks both.
#ifndef SIKV_APPS_DATASET_DATASET_H_
#define SIKV_APPS_DATASET_DATASET_H_

#include "apps/common/command.h"

namespace sikv {

Command add_dataset(CLI::App& app);

}  // namespace sikv

#endif  // SIKV_APPS_DATASET_DATASET_H_

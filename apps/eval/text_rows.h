// Teacher-forced steps over texts: what each pipeline adds to NLL, its KL to dense, and what it
// costs.
#ifndef SIKV_APPS_EVAL_TEXT_ROWS_H_
#define SIKV_APPS_EVAL_TEXT_ROWS_H_

#include "apps/eval/eval_session.h"

namespace sikv {

// Prints a table; after Ctrl-C what is finished, and throws Interrupted.
void evaluate_texts(EvalSession& session);

}  // namespace sikv

#endif  // SIKV_APPS_EVAL_TEXT_ROWS_H_

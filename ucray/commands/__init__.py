"""The commands of `ucray`, a function each: arguments in, a job called, its result shown."""

"""From a configuration to records: plan, prompts, answers, measurements."""

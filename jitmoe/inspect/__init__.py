"""Those who look: tracing, checking, capturing, replaying and judging calls."""

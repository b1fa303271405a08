"""The laboratory: what researches, measures and demonstrates. The engine imports none of it."""

"""Workflows: definitions, templates between steps, and the state table of a run. All but templates.Templates is pure; whoever runs a
workflow drives state.FlowState."""

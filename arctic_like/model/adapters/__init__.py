"""Adapters: a few trained weights beside a frozen model, made and read by peft."""

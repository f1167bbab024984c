"""TopK language models as Hugging Face models: conversion from and to Megatron's checkpoints."""

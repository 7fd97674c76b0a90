"""Learners: what a student step does with the images (phase 2)."""

LEARNERS = {"distill": "datafree.learners.distill:DistillLearner"}

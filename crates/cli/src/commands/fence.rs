//! `pgherd fence`: the agent's sibling that can only stop PostgreSQL. Started by the agent, not by people.

use clap::Args;

use crate::failure::Failure;

/// Stop PostgreSQL when its agent has gone silent; started by the agent
#[derive(Debug, Args)]
pub(crate) struct FenceArgs {}

pub(crate) fn run(_: FenceArgs) -> Result<(), Failure> {
    pgherd_agent::fence::run().map_err(Failure::from)
}

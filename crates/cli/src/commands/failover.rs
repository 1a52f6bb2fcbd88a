//! `pgherd failover`: makes a node primary where the rules forbid an automatic failover.

use std::time::Duration;

use clap::Args;
use pgherd_api::change::FailoverRequest;

use super::change;
use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::confirm::confirm;

const WITHIN: Duration = Duration::from_secs(120);

/// Make a node primary although acknowledged commits may be lost
///
/// For when every copy that is known to be complete is gone for good. Nodes that can be reached are sealed
/// first; those that cannot are named, and must not come back with clients on them. A failover that loses
/// nothing happens by itself and needs no command.
#[derive(Debug, Args)]
pub(crate) struct FailoverArgs {
    /// Node to become primary
    #[arg(long, value_name = "NODE")]
    to: String,
    /// Accept that acknowledged commits may be lost
    #[arg(long)]
    accept_data_loss: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) async fn run(args: FailoverArgs, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let status = agents.call(async |client| client.status().await).await?;
    let cluster = super::cluster(&status, global.cluster.as_deref())?;
    super::known_node(cluster, &args.to)?;
    if args.accept_data_loss {
        let what = format!(
            "cluster {}: {} becomes primary with what it has; acknowledged commits that only others hold are lost",
            cluster.name, args.to
        );
        confirm(&what, "Fail over and accept the loss?", args.yes)?;
    }
    // Without the acceptance it is asked all the same: the refusal says what is at risk.
    let request = FailoverRequest {
        request_id: change::request_id(),
        cluster: Some(cluster.name.clone()),
        to: args.to.clone(),
        accept_data_loss: args.accept_data_loss,
    };
    let begun = agents.call(async |client| client.failover(&request).await).await?;
    change::follow(&agents, global, begun, WITHIN).await
}

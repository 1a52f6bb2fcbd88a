//! `pgherd switchover`: a planned change of primary.

use std::time::Duration;

use clap::Args;
use pgherd_api::change::{SwitchoverCancelRequest, SwitchoverRequest};

use super::change;
use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::confirm::confirm;
use crate::output::{print_json, print_line};

/// A checkpoint of a busy server comes first and can take minutes.
const WITHIN: Duration = Duration::from_secs(300);

/// Hand over to another node, losing nothing
///
/// A checkpoint is made first. Then the proxies let the transactions of their clients end, for five seconds at most, and
/// hold what is new until the new primary is there, usually within a second. Sessions that are connected to the old primary
/// without a proxy end. It becomes a standby.
#[derive(Debug, Args)]
pub(crate) struct SwitchoverArgs {
    /// Node to become primary [default: the best one]
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Take back a switchover that has not handed over yet
    #[arg(long, conflicts_with_all = ["to", "yes"])]
    cancel: bool,
    /// When to begin
    #[arg(long, value_name = "TIME", hide = true, conflicts_with = "cancel")]
    at: Option<String>,
}

pub(crate) async fn run(args: SwitchoverArgs, global: &Global) -> Result<(), Failure> {
    if args.at.is_some() {
        return Err(Failure::not_built("pgherd switchover --at"));
    }
    let agents = Agents::find(global)?;
    if args.cancel {
        return cancel(&agents, global).await;
    }
    let status = agents.call(async |client| client.status().await).await?;
    let cluster = super::cluster(&status, global.cluster.as_deref())?;
    if let Some(to) = &args.to {
        super::known_node(cluster, to)?;
        if cluster.primary.as_ref() == Some(to) {
            return print_line(&format!("{to} is primary of cluster {} already", cluster.name));
        }
    }
    let from = cluster.primary.as_deref().ok_or_else(|| {
        Failure::refused(format!("cluster {} has no primary to hand over from", cluster.name))
            .hint("pgherd explain says what it waits for")
    })?;
    let to = args.to.as_deref().unwrap_or("the best standby");
    let what = format!(
        "cluster {}: {from} hands over to {to}; clients of proxies wait for about a second, others on {from} lose their sessions",
        cluster.name
    );
    confirm(&what, "Switch over?", args.yes)?;

    let request = SwitchoverRequest {
        request_id: change::request_id(),
        cluster: Some(cluster.name.clone()),
        to: args.to,
        at: None,
    };
    let begun = agents.call(async |client| client.switchover(&request).await).await?;
    change::follow(&agents, global, begun, WITHIN).await
}

async fn cancel(agents: &Agents, global: &Global) -> Result<(), Failure> {
    let request = SwitchoverCancelRequest { cluster: global.cluster.clone() };
    let change = agents.call(async |client| client.switchover_cancel(&request).await).await?;
    if global.json {
        return print_json(&change);
    }
    print_line(&format!("the switchover of cluster {} is cancelled", change.cluster))
}

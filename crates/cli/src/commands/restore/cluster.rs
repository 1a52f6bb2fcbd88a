//! `pgherd restore --cluster`: the whole cluster goes back to a moment. One node is taken there and held, then it leads.

use std::time::{Duration, Instant};

use clap::Args;
use pgherd_agent::backups::recover::{self, Back, Order};
use pgherd_api::backup::ClusterRestorePlan;
use pgherd_api::change::{RestoreAnswer, RestoreRequest, RestoreStep};
use pgherd_api::status::{Cluster, Role};

use super::super::change;
use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::confirm::{confirm, confirm_by_name};
use crate::output::numbers::bytes;
use crate::output::{note, print, print_json, print_line};

const ASK_EVERY: Duration = Duration::from_millis(500);
/// For so long an agent that answers may not have heard of it yet.
const HEARD_WITHIN: Duration = Duration::from_secs(5);
/// An election, and the first of the others behind it, which may have to be made anew before clients come in.
const LEADS_WITHIN: Duration = Duration::from_secs(3600);

#[derive(Debug, Args)]
#[command(next_help_heading = "The whole cluster")]
pub(super) struct ClusterArgs {
    /// Take this cluster back, with all its nodes
    #[arg(long, value_name = "NAME", conflicts_with_all = [
        "table", "cluster_system", "target_action", "delta", "tablespace", "wal_dir", "jobs", "max_rate",
    ])]
    pub(super) cluster: Option<String>,
    /// Only take a node there and hold it; --lead goes on from there
    #[arg(long, requires = "cluster", conflicts_with_all = ["lead", "let_go"])]
    hold: bool,
    /// Have the node that is held lead, and the others follow it
    #[arg(long, requires = "cluster", conflicts_with_all = ["let_go", "to", "dry_run"])]
    lead: bool,
    /// Give it up: the node that is held follows the primary again
    #[arg(long, requires = "cluster", conflicts_with_all = ["to", "dry_run"])]
    let_go: bool,
}

impl ClusterArgs {
    /// Nothing is planned for it.
    pub(super) fn is_only_a_word(&self) -> bool {
        self.lead || self.let_go
    }
}

/// The second step, or the end of the first.
pub(super) async fn say(args: ClusterArgs, yes: bool, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let cluster = look(&agents, &args).await?;
    if args.lead {
        return lead(&agents, &cluster, yes, global).await;
    }
    let answer = ask(&agents, &cluster.name, RestoreStep::LetGo).await?;
    if global.json {
        return print_json(&answer);
    }
    print_line(&format!("{} is let go, and follows the primary again", answer.node))
}

pub(super) async fn run(
    args: ClusterArgs,
    order: Order,
    dry_run: bool,
    yes: bool,
    global: &Global,
) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let cluster = look(&agents, &args).await?;
    let node = order.to.to_str().map(str::to_owned).filter(|node| !node.is_empty());
    if let Some(node) = &node {
        super::super::known_node(&cluster, node)?;
    }
    let back = recover::back(&order).await.map_err(super::failed)?;
    let report = back.report();
    if cluster.system_identifier.as_ref().is_some_and(|system| *system != report.system_identifier) {
        return Err(Failure::refused(format!(
            "the repository in {} has another cluster's backups",
            report.repository
        ))
        .hint("--repository FILE names another one"));
    }
    let plan = plan(&cluster, node, &back);
    if !global.json {
        print(&told(&plan, &back))?;
    }
    if dry_run {
        return if global.json { print_json(&plan) } else { Ok(()) };
    }
    let who = plan.node.as_deref().unwrap_or("a standby");
    let what = format!("{who} gives up its copy, and is held at that moment; the others go on.");
    confirm(&what, "Take it there?", yes)?;
    let step = RestoreStep::Hold { node: plan.node.clone(), moment: back.moment() };
    let answer = ask(&agents, &cluster.name, step).await?;
    tokio::select! {
        held = until_held(&agents, &answer) => held?,
        _ = tokio::signal::ctrl_c() => {
            note(&format!(
                "{} goes on with it; pgherd restore --cluster {} --let-go gives it up",
                answer.node, answer.cluster
            ));
            return Err(Failure::Interrupted);
        }
    }
    if args.hold {
        if global.json {
            return print_json(&answer);
        }
        return print_line(&format!(
            "{} is held there; pgherd restore --cluster {} --lead has it lead, --let-go gives it up",
            answer.node, answer.cluster
        ));
    }
    lead(&agents, &cluster, yes, global).await
}

async fn look(agents: &Agents, args: &ClusterArgs) -> Result<Cluster, Failure> {
    let status = agents.call(async |client| client.status().await).await?;
    super::super::cluster(&status, args.cluster.as_deref()).cloned()
}

async fn ask(agents: &Agents, cluster: &str, step: RestoreStep) -> Result<RestoreAnswer, Failure> {
    let request =
        RestoreRequest { request_id: change::request_id(), cluster: Some(cluster.to_owned()), step };
    agents.call(async |client| client.restore(&request).await).await
}

async fn lead(agents: &Agents, cluster: &Cluster, yes: bool, global: &Global) -> Result<(), Failure> {
    let what = format!(
        "cluster {}: {} leads with what it is held at, the primary stops, and whatever came behind that moment is given up",
        cluster.name,
        look_again(agents, cluster).await?
    );
    let name = &cluster.name;
    let hint = format!("it stays held: pgherd restore --cluster {name} --lead goes on, --let-go gives it up");
    confirm_by_name(&what, name, yes).map_err(|failure| failure.hint(hint))?;
    let answer = ask(agents, name, RestoreStep::Lead).await?;
    let begun = answer.change.ok_or_else(|| Failure::failed("the agent did not say how it goes on"))?;
    change::follow(agents, global, begun, LEADS_WITHIN).await
}

/// Who is held.
async fn look_again(agents: &Agents, cluster: &Cluster) -> Result<String, Failure> {
    let status = agents.call(async |client| client.status().await).await?;
    let now = super::super::cluster(&status, Some(&cluster.name))?;
    let held = now.restore.as_ref().filter(|restore| restore.held);
    held.map(|restore| restore.node.clone()).ok_or_else(|| {
        Failure::refused(format!("no node of cluster {} is held at an earlier moment", cluster.name))
            .hint("pgherd status says how far it is; without --lead, and with a target, it is begun")
    })
}

/// Tells what the node does on its way, until it is there.
async fn until_held(agents: &Agents, answer: &RestoreAnswer) -> Result<(), Failure> {
    let (mut told, mut trouble) = (None, None);
    let mut seen = Instant::now();
    loop {
        let status = agents.call(async |client| client.status().await).await?;
        let cluster = super::super::cluster(&status, Some(&answer.cluster))?;
        let Some(restore) = cluster.restore.as_ref().filter(|restore| restore.node == answer.node) else {
            if seen.elapsed() < HEARD_WITHIN {
                tokio::time::sleep(ASK_EVERY).await;
                continue;
            }
            return Err(Failure::failed(format!("{} was let go, or leads already", answer.node))
                .hint("pgherd history tells more"));
        };
        seen = Instant::now();
        if restore.held {
            return Ok(());
        }
        if restore.trouble != trouble {
            trouble.clone_from(&restore.trouble);
            if let Some(why) = &trouble {
                note(&format!("{} could not be taken there, and tries again: {why}", answer.node));
            }
        }
        let explained = agents.call(async |client| client.explain().await).await?;
        let of_node = explained.nodes.into_iter().find(|explanation| explanation.node == answer.node);
        let code = of_node.as_ref().map(|explanation| explanation.reason_code.clone());
        if let Some(explanation) = of_node.filter(|_| code != told) {
            note(&format!("{} {}", explanation.node, explanation.reason));
            told = code;
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

fn plan(cluster: &Cluster, node: Option<String>, back: &Back) -> ClusterRestorePlan {
    let report = back.report();
    let primary = cluster.members.iter().find(|member| member.role == Role::Primary);
    ClusterRestorePlan {
        cluster: cluster.name.clone(),
        node,
        primary: cluster.primary.clone(),
        repository: report.repository,
        system_identifier: report.system_identifier,
        postgresql_version: report.postgresql_version,
        backup: report.backup,
        target: report.target,
        dropped: report.dropped,
        timelines: report.timelines,
        wal_from: report.wal_from,
        wal_segments: report.wal_segments,
        end: report.end,
        lost_wal_bytes: primary.and_then(|primary| back.behind(primary.lsn.as_deref()?)),
        bytes: report.bytes,
    }
}

/// The plan for people.
fn told(plan: &ClusterRestorePlan, back: &Back) -> String {
    let mut lines = super::recovery_lines(&back.report());
    let behind = match (plan.lost_wal_bytes, &plan.end.next) {
        (Some(lost), Some(next)) => {
            format!("{} of WAL, with everything committed from {} on", bytes(lost), next.at)
        }
        (Some(lost), None) => {
            format!("{} of WAL, and no transaction in it that is in the repository", bytes(lost))
        }
        (None, Some(next)) => format!("everything committed from {} on", next.at),
        (None, None) => "what is not in the repository".to_owned(),
    };
    lines.push(("given up", behind));
    let who = plan.node.as_deref().unwrap_or("the standby that can best be done without");
    lines.push(("first", format!("{who} is made anew from it, {}, and held there", bytes(plan.bytes))));
    let primary = plan.primary.as_deref().unwrap_or("the primary");
    lines
        .push(("then", format!("it leads cluster {}, and {primary} and the others follow it", plan.cluster)));
    super::aligned(&lines)
}

//! `pgherd explain`: why each node does what it does, in one sentence each, and what would help.

use pgherd_api::report::{Explain, Explanation};
use pgherd_core::types::NodeName;

use super::{Seen, Sight, milliseconds, names, span};

pub(crate) fn explain(sight: &Sight<'_>) -> Explain {
    let spec = &sight.picture.spec;
    let missing = sight.missing_votes();
    let of_clusters = spec.clusters.iter().flat_map(|cluster| {
        let name = Some(cluster.name.to_string());
        cluster.nodes.iter().map(move |node| (name.clone(), &node.name))
    });
    let of_witnesses = spec.witnesses.iter().map(|witness| (None, &witness.name));
    let nodes = of_clusters.chain(of_witnesses);
    Explain { nodes: nodes.map(|(cluster, name)| explanation(sight, cluster, name, &missing)).collect() }
}

fn explanation<'a>(
    sight: &Sight<'a>,
    cluster: Option<String>,
    name: &'a NodeName,
    missing: &[&'a NodeName],
) -> Explanation {
    let seen = sight.seen(name);
    let is_data_node = cluster.is_some();
    // A node that could lead, or did, is where the election's wait is felt.
    let waits = is_data_node && !missing.is_empty() && !missing.contains(&name);
    let waiting_for: Vec<String> = match waits {
        true => missing.iter().map(|node| vote_of(sight, sight.seen(node))).collect(),
        false => Vec::new(),
    };
    let (reason_code, reason) = match seen.says {
        Some(says) if says.show.reason.is_empty() => {
            ("starting".to_owned(), "has just started, and has not looked around yet".to_owned())
        }
        Some(says) => (says.show.reason_code.clone(), says.show.reason.clone()),
        None => ("not-heard".to_owned(), silent(sight, seen)),
    };
    Explanation {
        cluster,
        node: name.to_string(),
        reason_code,
        reason,
        waiting_for,
        hint: hint(sight, seen, missing, is_data_node),
        for_ms: seen.says.map(|says| says.show.for_ms.saturating_add(seen.age.map_or(0, milliseconds))),
        age_ms: seen.age.map(milliseconds),
    }
}

/// The sentence about a node that does not speak for itself.
fn silent(sight: &Sight<'_>, seen: Seen<'_>) -> String {
    let silence = seen.silence();
    let grace = sight.picture.spec.times.agent_grace;
    match sight.reign() {
        Some(reign) if reign.holder.node == *seen.name => {
            let term = sight.record().map_or(0, |record| record.term.0);
            format!(
                "holds term {term} and {silence}; its agent has {} to come back, less if the voters cannot reach its \
                 PostgreSQL either",
                span(grace)
            )
        }
        _ => silence,
    }
}

fn vote_of(sight: &Sight<'_>, seen: Seen<'_>) -> String {
    let name = seen.name;
    match seen.says {
        None if name.is_repository() && sight.repository_answers() => {
            "the vote of the repository, which answers, and is being sealed and looked at".to_owned()
        }
        None if name.is_repository() => {
            "the vote of the repository, which does not answer: an acknowledged commit may be only there"
                .to_owned()
        }
        None => {
            format!("the vote of {name}, which {}: an acknowledged commit may be only there", seen.silence())
        }
        Some(says) if sight.record().is_some_and(|record| record.election.is_some()) => {
            format!("the vote of {name}, which {}", says.show.reason)
        }
        Some(_) => format!("the vote of {name}"),
    }
}

fn hint(sight: &Sight<'_>, seen: Seen<'_>, missing: &[&NodeName], is_data_node: bool) -> Option<String> {
    if is_data_node && !missing.is_empty() {
        let lost = names(missing.iter().copied());
        let override_it = sight.best_survivor().map(|to| {
            format!("; if that is impossible, and losing what only {lost} may hold is acceptable: pgherd failover --to {to} --accept-data-loss")
        });
        return Some(format!("bring {lost} back{}", override_it.unwrap_or_default()));
    }
    match seen.says {
        None => Some(format!("on the host of {}: is the agent running, and is its port open?", seen.name)),
        Some(_) if sight.barred(seen.name).is_some() => {
            Some(format!("repair what is named, or make its copy anew: pgherd reinit {}", seen.name))
        }
        Some(says) if says.show.reason_code == "operator-stopped" => {
            Some("starting its agent again lets it go on".to_owned())
        }
        Some(says) if says.show.reason_code == "held" => Some(
            "pgherd restore --cluster NAME --lead has it lead, and gives up what came behind; --let-go has it follow again"
                .to_owned(),
        ),
        Some(says) if says.show.reason_code == "commits-wait" => Some(
            "bring a voter back; degrade_after in the herd file would let commits go on with fewer"
                .to_owned(),
        ),
        Some(says) if says.show.reason_code == "commits-wait-for-repository" => Some(
            "pgherd status says why nothing arrives in the repository; degrade_after in the herd file would let commits go on without it"
                .to_owned(),
        ),
        Some(says) if says.show.reason_code == "repository-awaited" => Some(
            "bring the repository back; pgherd backup list says on each host whether it is reached".to_owned(),
        ),
        Some(says) if says.show.reason_code == "waiting-for-heir" => Some(
            "join a node without data, or start the agent of one whose disk was lost: its copy is made from the repository"
                .to_owned(),
        ),
        Some(_) => {
            sight.vip_trouble(seen.name).map(|why| format!("the address that moves with the gate: {why}"))
        }
    }
}

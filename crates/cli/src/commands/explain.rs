//! `pgherd explain`: why each node does, or does not do, what it does right now.

use clap::Args;
use pgherd_api::report::Explanation;

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::numbers::span;
use crate::output::style::{Style, Tone, plain};
use crate::output::{print_json, print_line};

/// News of a node that is older than this is told with its age: what holds there may have changed since.
const OLD_NEWS_MS: u64 = 3_000;

/// Say why each node does, or does not do, what it does right now
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Only this node
    #[arg(value_name = "NODE")]
    node: Option<String>,
}

pub(crate) async fn run(args: ExplainArgs, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let mut explain = agents.call(async |client| client.explain().await).await?;
    if let Some(cluster) = &global.cluster {
        explain.nodes.retain(|node| node.cluster.as_ref() == Some(cluster));
    }
    if let Some(node) = &args.node {
        let names = explain.nodes.iter().map(|node| node.node.as_str()).collect::<Vec<_>>().join(", ");
        let unknown =
            Failure::usage(format!("there is no node \"{node}\"")).hint(format!("there are: {names}"));
        explain.nodes.retain(|known| known.node == *node);
        if explain.nodes.is_empty() {
            return Err(unknown);
        }
    }
    if global.json {
        return print_json(&explain);
    }
    let width = explain.nodes.iter().map(|node| node.node.chars().count()).max().unwrap_or(0);
    let lines: Vec<String> =
        explain.nodes.iter().flat_map(|node| lines(node, width, Style::of_stdout())).collect();
    print_line(&lines.join("\n"))
}

fn lines(node: &Explanation, width: usize, style: Style) -> Vec<String> {
    let name = format!("{:width$}", plain(&node.node));
    let since = node.for_ms.map_or(String::new(), |ms| format!(" for {}", span(ms)));
    let age = match node.age_ms {
        Some(age_ms) if age_ms > OLD_NEWS_MS => format!(", last heard {} ago", span(age_ms)),
        None => ", not heard yet".to_owned(),
        Some(_) => String::new(),
    };
    let aside = format!("{since}{age}");
    let aside = aside.trim_start_matches([',', ' ']);
    let aside =
        if aside.is_empty() { String::new() } else { style.paint(Tone::Faint, &format!("  ({aside})")) };
    let mut lines = vec![format!("{}  {}{aside}", style.paint(Tone::Strong, &name), plain(&node.reason))];
    let indent = " ".repeat(width + 2);
    lines.extend(node.waiting_for.iter().map(|what| format!("{indent}waits for: {}", plain(what))));
    lines.extend(node.hint.iter().map(|hint| format!("{indent}hint: {}", plain(hint))));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sentence_and_what_it_waits_for() {
        let mut node = Explanation {
            cluster: Some("main".to_owned()),
            node: "a".to_owned(),
            reason_code: "holds-term".to_owned(),
            reason: "holds term 4".to_owned(),
            waiting_for: vec!["b to stream".to_owned()],
            hint: Some("pgherd logs b".to_owned()),
            for_ms: Some(61_000),
            age_ms: Some(100),
        };
        assert_eq!(
            lines(&node, 2, Style::PLAIN),
            ["a   holds term 4  (for 1 min)", "    waits for: b to stream", "    hint: pgherd logs b"]
        );
        node.for_ms = None;
        node.age_ms = Some(9_000);
        assert_eq!(lines(&node, 1, Style::PLAIN)[0], "a  holds term 4  (last heard 9.0 s ago)");
    }
}

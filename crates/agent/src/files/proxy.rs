//! `proxy.toml`: what a proxy has to know before it can ask an agent, from its text and back.
//!
//! What the herd wants of its proxies stands in the herd file, and comes from the agents while the proxy runs.

use std::net::IpAddr;

use pgherd_core::types::NodeName;

use super::agent::HostPort;
use super::finding::{Findings, Kind, Mistake};
use super::reader::{Reader, Section, Table, key};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyFile {
    /// In its certificate.
    pub name: NodeName,
    pub cluster: NodeName,
    /// The herd's name, for whoever reads the file.
    pub herd: Option<String>,
    /// One address for both listeners.
    pub listen: IpAddr,
    /// `None`: as the herd file has it.
    pub port: Option<u16>,
    pub read_port: Option<u16>,
    pub agents: Vec<HostPort>,
}

static TOP: Section = Section {
    header: "",
    keys: &[
        key("name", "a text", "\"up\"", "", "the proxy's name, which its certificate bears"),
        key("cluster", "a text", "\"main\"", "", "the cluster whose clients it serves"),
        key("herd", "a text", "\"shop\"", "none", "the herd's name; nothing depends on it"),
        key("listen", "a text", "\"192.0.2.7\"", "0.0.0.0", "the address that clients reach it by"),
        key("port", "a port", "9999", "the herd file's", "where clients reach the primary"),
        key("read_port", "a port", "9998", "the herd file's", "where clients reach standbys"),
        key("agents", "texts", "[\"https://192.0.2.10:8009\"]", "", "agents of the herd to ask"),
    ],
};

const URL: &str = "https://";

impl ProxyFile {
    /// Reads a proxy file; `file` is its name for messages.
    pub fn read(file: &str, text: &str) -> Result<ProxyFile, Findings> {
        let (mut reader, top) = Reader::parse(text);
        let top = reader.top(&top, &TOP);
        let unreadable = || "unreadable".parse().expect("a lower-case word is a name");
        let read = ProxyFile {
            name: reader.parsed(&top, "name").or(unreadable()),
            cluster: reader.parsed(&top, "cluster").or(unreadable()),
            herd: reader.text(&top, "herd").some(),
            listen: reader.parsed(&top, "listen").or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)),
            port: read_port(&mut reader, &top, "port"),
            read_port: read_port(&mut reader, &top, "read_port"),
            agents: read_agents(&mut reader, &top),
        };
        if read.port.is_some() && read.port == read.read_port {
            let at = top.at.key("read_port");
            let message = "port and read_port are the same";
            reader.mistake(
                Mistake::new(Kind::BrokenRule, reader.span_of(&at), message)
                    .hint("one leads to the primary, the other to standbys"),
            );
        }
        if reader.has_errors() { Err(reader.finish(file)) } else { Ok(read) }
    }

    /// The file; reading it back gives the same values.
    pub fn write(&self) -> String {
        let quoted = |text: &str| toml_edit::Value::from(text).to_string();
        let mut file = String::from("# What this proxy knows before it asks an agent.\n");
        let mut line = |key: &str, value: String| file.push_str(&format!("{key} = {value}\n"));
        line("name", quoted(self.name.as_str()));
        line("cluster", quoted(self.cluster.as_str()));
        if let Some(herd) = &self.herd {
            line("herd", quoted(herd));
        }
        line("listen", quoted(&self.listen.to_string()));
        for (key, port) in [("port", self.port), ("read_port", self.read_port)] {
            if let Some(port) = port {
                line(key, port.to_string());
            }
        }
        let agents: Vec<String> = self.agents.iter().map(|agent| quoted(&format!("{URL}{agent}"))).collect();
        line("agents", format!("[{}]", agents.join(", ")));
        file
    }
}

/// `https://host:port`, as agents give their addresses.
pub fn agent_url(text: &str) -> Option<HostPort> {
    text.strip_prefix(URL)?.trim_end_matches('/').parse().ok()
}

fn read_port(reader: &mut Reader<'_>, top: &Table<'_>, key: &str) -> Option<u16> {
    reader.whole(top, key, 1, u64::from(u16::MAX)).some().map(|port| port as u16)
}

fn read_agents(reader: &mut Reader<'_>, top: &Table<'_>) -> Vec<HostPort> {
    let texts = reader.texts(top, "agents");
    let at = top.at.key("agents");
    let mut agents = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let at = at.index(index);
        if reader.is_broken(&at) {
            continue;
        }
        match agent_url(text) {
            Some(agent) => agents.push(agent),
            None => {
                let hint = Some("write it with its port: \"https://192.0.2.10:8009\"".to_owned());
                reader.wrong_value(&at, format!("\"{text}\" is not the URL of an agent"), hint);
            }
        }
    }
    if texts.is_empty() && !reader.is_broken(&at) {
        let hint = Some("agents = [\"https://192.0.2.10:8009\"]".to_owned());
        reader.wrong_value(&at, "no agent is named".to_owned(), hint);
    }
    agents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let file = ProxyFile {
            name: "up".parse().unwrap(),
            cluster: "main".parse().unwrap(),
            herd: Some("a \"shop\"".to_owned()),
            listen: "::1".parse().unwrap(),
            port: Some(9999),
            read_port: None,
            agents: vec!["192.0.2.1:8009".parse().unwrap(), "[2001:db8::1]:8010".parse().unwrap()],
        };
        assert_eq!(ProxyFile::read("proxy.toml", &file.write()).unwrap(), file);
    }

    #[test]
    fn mistakes_are_told_all_at_once() {
        let text = "name = \"Up\"\ncluster = \"main\"\nlisten = \"everywhere\"\nport = 0\nagents = [\"a:8009\"]\nprot = 1\n";
        let findings = ProxyFile::read("proxy.toml", text).unwrap_err().to_string();
        for told in ["proxy.toml:1:8", "everywhere", "\"a:8009\" is not the URL of an agent", "prot"] {
            assert!(findings.contains(told), "{told} in {findings}");
        }
        let same =
            "name = \"up\"\ncluster = \"main\"\nport = 7\nread_port = 7\nagents = [\"https://a:8009\"]\n";
        assert!(ProxyFile::read("proxy.toml", same).unwrap_err().to_string().contains("are the same"));
        let nobody = "name = \"up\"\ncluster = \"main\"\nagents = []\n";
        assert!(ProxyFile::read("proxy.toml", nobody).unwrap_err().to_string().contains("no agent is named"));
    }
}

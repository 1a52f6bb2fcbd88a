//! Every route of `/v1/`, once: the server's router, the client and the tests of who may call what are made
//! from this list.

use std::time::Duration;

/// The server closes a connection on which no request has begun for so long. Clients stop using an idle
/// one a good while before, so that no request crosses the close.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// In a stream of lines the server sends an empty one when it has had nothing to say for so long.
pub const HEARTBEAT: Duration = Duration::from_secs(5);

/// Who may call a route. The server's handlers name the same thing in their parameters; a test holds the
/// two against each other for every route and every kind of credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// No certificate needed: the body carries its own proof (a token, a signature).
    Anyone,
    /// A node or an operator of this herd.
    Member,
    /// A node, an operator or a proxy of this herd: whoever may know where clients are sent.
    Follower,
    /// A node of this herd, and no operator: what agents tell each other.
    Node,
    /// An operator, and no node: what changes the herd in a person's name.
    Operator,
    /// A proxy of this herd, and nobody else.
    Proxy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Post,
}

impl Method {
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Post => "POST",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub method: Method,
    /// A `{name}` segment is a parameter.
    pub path: &'static str,
    pub access: Access,
}

impl Route {
    /// The path with its only parameter filled in. The value must need no escaping.
    pub fn with(&self, value: &str) -> String {
        match (self.path.find('{'), self.path.find('}')) {
            (Some(open), Some(close)) => {
                format!("{}{value}{}", &self.path[..open], &self.path[close + 1..])
            }
            _ => self.path.to_owned(),
        }
    }
}

macro_rules! routes {
    ($($name:ident = $method:ident $path:literal $access:ident;)*) => {
        $(pub const $name: Route = Route { method: Method::$method, path: $path, access: Access::$access };)*
        pub const ALL: &[Route] = &[$($name),*];
    };
}

routes! {
    STATUS = Get "/v1/status" Member;
    HISTORY = Get "/v1/history" Member;
    EXPLAIN = Get "/v1/explain" Member;
    CHECK = Get "/v1/check" Member;
    SPEC = Get "/v1/spec" Member;
    LOGS = Get "/v1/logs" Member;
    ROUTING = Get "/v1/routing" Follower;
    PROXY = Get "/v1/proxy" Follower;
    CHANGE = Get "/v1/changes/{request_id}" Member;
    PLAN = Post "/v1/plan" Operator;
    APPLY = Post "/v1/apply" Operator;
    SWITCHOVER = Post "/v1/switchover" Operator;
    SWITCHOVER_CANCEL = Post "/v1/switchover/cancel" Operator;
    FAILOVER = Post "/v1/failover" Operator;
    RESTORE = Post "/v1/restore" Operator;
    BACKUP = Post "/v1/backups" Operator;
    TOKEN_CREATE = Post "/v1/tokens" Operator;
    OPERATOR_ADD = Post "/v1/operators" Operator;
    PROXY_ADD = Post "/v1/proxies" Operator;
    DRAINED = Post "/v1/drained" Proxy;
    PROMOTE = Post "/v1/promote" Proxy;
    PROXY_RENEW = Post "/v1/proxies/renew" Proxy;
    RENEW = Post "/v1/renew" Node;
    RAFT = Post "/v1/raft/{rpc}" Node;
    PEER_REPORT = Post "/v1/peer" Node;
    OBJECTS = Post "/v1/objects" Member;
    WAL = Post "/v1/wal" Node;
    JOIN = Post "/v1/join" Anyone;
    FENCED = Post "/v1/fenced" Anyone;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_filled_in() {
        assert_eq!(RAFT.with("append"), "/v1/raft/append");
        assert_eq!(STATUS.with("x"), "/v1/status");
    }
}

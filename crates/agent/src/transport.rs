//! Raft's requests over the agents' own API: the store's view of the network.

use std::time::Duration;

use futures_util::future::BoxFuture;
use pgherd_core::types::NodeName;
use pgherd_dcs::{Transport, TransportError};

use crate::peers::Peers;

pub(crate) struct OverApi(pub Peers);

impl Transport for OverApi {
    fn call(
        &self,
        peer: &NodeName,
        address: &str,
        rpc: &'static str,
        body: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, TransportError>> {
        let client = self.0.client(peer, address).within(timeout);
        Box::pin(async move {
            match client.raft(rpc, body.into()).await {
                Ok(answer) => Ok(answer.into()),
                Err(error) if error.was_not_done() => Err(TransportError::NotSent(error.to_string())),
                Err(error) => Err(TransportError::NoAnswer(error.to_string())),
            }
        })
    }
}

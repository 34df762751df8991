//! The Identity service.

use std::collections::HashMap;

use async_trait::async_trait;
use tonic::{Code, Request, Response, Status};

use super::proto::v1::identity_server::Identity;
use super::proto::v1::plugin_capability::{self, service};
use super::proto::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use super::readiness::Readiness;
use super::status::status;

/// Who we are, and whether we work.
#[derive(Debug, Clone)]
pub(super) struct IdentityService {
    pub driver_name: String,
    /// The Controller service stands behind the same socket.
    pub controller: bool,
    pub readiness: Readiness,
}

#[async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.driver_name.clone(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: HashMap::from([("url".to_owned(), env!("CARGO_PKG_REPOSITORY").to_owned())]),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let controller = plugin_capability::Service { r#type: service::Type::ControllerService.into() };
        let capability = PluginCapability { r#type: Some(plugin_capability::Type::Service(controller)) };
        // No topology: every volume can be used on every node.
        let capabilities = if self.controller { vec![capability] } else { Vec::new() };
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Not started yet: `ready: false`, come again. Something is broken: FAILED_PRECONDITION, which can say what.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        if !self.readiness.is_started() {
            return Ok(Response::new(ProbeResponse { ready: Some(false) }));
        }
        self.readiness.check().await.map_err(|why| status(Code::FailedPrecondition, &format!("not ready: {why}")))?;
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}

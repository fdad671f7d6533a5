package testserver

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
)

// EtcdConfig configures [StartEtcd]. The zero value is a one-node cluster that lets
// everybody in.
type EtcdConfig struct {
	// NoFsync trades the data's surviving a power cut for speed. It survives
	// [Server.Kill] all the same.
	NoFsync bool
	TLS     TLSMode
	// Args are further flags, such as "--quota-backend-bytes=16777216".
	Args []string
}

// StartEtcd starts an etcd server. ctx governs the start only; without a deadline
// the server has a minute to get ready, not counting the time to build it.
func StartEtcd(ctx context.Context, cfg EtcdConfig) (*Server, error) {
	binary, err := pinnedBinary(ctx, "ETCD_SERVER", "etcd", "go.etcd.io/etcd/server/v3")
	if err != nil {
		return nil, err
	}
	scheme := "http"
	if cfg.TLS != NoTLS {
		scheme = "https"
	}
	return start(ctx, kind{
		name: "etcd", binary: binary, ports: 2, scheme: scheme,
		args:  func(s *Server) ([]string, error) { return etcdArgs(s, cfg), nil },
		ready: etcdReady,
	}, cfg.TLS)
}

func etcdArgs(s *Server, cfg EtcdConfig) []string {
	peer := "http://" + s.port(1).Addr()
	args := []string{
		"--name=test",
		// A directory below: etcd wants to make it itself, with its own mode.
		"--data-dir=" + filepath.Join(s.data(), "etcd"),
		"--listen-client-urls=" + s.URL(),
		"--advertise-client-urls=" + s.URL(),
		"--listen-peer-urls=" + peer,
		"--initial-advertise-peer-urls=" + peer,
		"--initial-cluster=test=" + peer,
		"--log-level=warn",
	}
	if cfg.NoFsync {
		args = append(args, "--unsafe-no-fsync")
	}
	if s.identity != nil {
		args = append(args,
			"--cert-file="+filepath.Join(s.dir, serverCertFile),
			"--key-file="+filepath.Join(s.dir, serverKeyFile))
		if s.identity.mode == MutualTLS {
			// A trusted CA alone would already make etcd ask for client certificates.
			args = append(args, "--client-cert-auth", "--trusted-ca-file="+filepath.Join(s.dir, caFile))
		}
	}
	return append(args, cfg.Args...)
}

// etcdReady asks /health, which is true only with a leader and a working store.
func etcdReady(ctx context.Context, s *Server) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL()+"/health", http.NoBody)
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: s.TLS(), DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), `"health":"true"`) {
		return fmt.Errorf("health: %s %q", resp.Status, body)
	}
	return nil
}

package testserver

import (
	"context"
	"path/filepath"
	"strconv"
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
	return one(StartEtcdCluster(ctx, 1, cfg))
}

// StartEtcdCluster starts a cluster of n nodes, as StartEtcd does one. They have one
// CA if they have TLS. It is ready when all of them agree on a leader.
func StartEtcdCluster(ctx context.Context, n int, cfg EtcdConfig) ([]*Server, error) {
	binary, err := pinnedBinary(ctx, "ETCD_SERVER", "etcd", "go.etcd.io/etcd/server/v3")
	if err != nil {
		return nil, err
	}
	scheme := "http"
	if cfg.TLS != NoTLS {
		scheme = "https"
	}
	return start(ctx, n, kind{
		name: "etcd", binary: binary, ports: 2, scheme: scheme,
		args:  func(s *Server) ([]string, error) { return etcdArgs(s, cfg), nil },
		ready: etcdReady,
	}, cfg.TLS)
}

func etcdArgs(s *Server, cfg EtcdConfig) []string {
	var cluster []string
	for _, node := range s.nodes {
		cluster = append(cluster, etcdName(node)+"="+etcdPeer(node))
	}
	args := []string{
		"--name=" + etcdName(s),
		// A directory below: etcd wants to make it itself, with its own mode.
		"--data-dir=" + filepath.Join(s.data(), "etcd"),
		"--listen-client-urls=" + s.URL(),
		"--advertise-client-urls=" + s.URL(),
		"--listen-peer-urls=" + etcdPeer(s),
		"--initial-advertise-peer-urls=" + etcdPeer(s),
		"--initial-cluster=" + strings.Join(cluster, ","),
		"--log-level=warn",
	}
	if cfg.NoFsync {
		args = append(args, "--unsafe-no-fsync")
	}
	if s.identity != nil {
		args = append(args,
			"--cert-file="+s.identity.path(serverCertFile),
			"--key-file="+s.identity.path(serverKeyFile))
		if s.identity.mode == MutualTLS {
			// A trusted CA alone would already make etcd ask for client certificates.
			args = append(args, "--client-cert-auth", "--trusted-ca-file="+s.identity.path(caFile))
		}
	}
	return append(args, cfg.Args...)
}

func etcdName(s *Server) string { return "node" + strconv.Itoa(s.index) }
func etcdPeer(s *Server) string { return "http://" + s.port(1).Addr() }

// etcdReady asks /health, which is true only with a leader and a working store.
func etcdReady(ctx context.Context, s *Server) error {
	return healthy(ctx, s.URL()+"/health", s.TLS(), `"health":"true"`)
}

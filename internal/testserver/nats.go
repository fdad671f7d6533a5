package testserver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// NATSConfig configures [StartNATS]. The zero value is a server with JetStream on
// disk that lets everybody in.
type NATSConfig struct {
	// User and Password, if set, are the only way in.
	User, Password string
	// NoJetStream starts a server that has only core NATS.
	NoJetStream bool
	// SyncAlways syncs every write to disk before it is acknowledged; the server's
	// default is every 2 minutes.
	SyncAlways bool
	TLS        TLSMode
	// Config is further text of the configuration file: accounts, permissions,
	// limits. What stands here wins over what is made here.
	Config string
}

// The second and third port of a NATS server.
const natsMonitor, natsRoutes = 1, 2

// StartNATS starts a NATS server. ctx governs the start only; without a deadline
// the server has a minute to get ready, not counting the time to build it.
func StartNATS(ctx context.Context, cfg NATSConfig) (*Server, error) {
	return one(StartNATSCluster(ctx, 1, cfg))
}

// StartNATSCluster starts a cluster of n nodes, as StartNATS does one. They have one
// CA if they have TLS. It is ready when JetStream has a leader that all of them know.
func StartNATSCluster(ctx context.Context, n int, cfg NATSConfig) ([]*Server, error) {
	binary, err := pinnedBinary(ctx, "NATS_SERVER", "nats-server", "github.com/nats-io/nats-server/v2")
	if err != nil {
		return nil, err
	}
	scheme := "nats"
	if cfg.TLS != NoTLS {
		scheme = "tls"
	}
	return start(ctx, n, kind{
		name: "nats", binary: binary, ports: 3, scheme: scheme,
		args:  func(s *Server) ([]string, error) { return natsArgs(s, cfg) },
		ready: natsReady,
	}, cfg.TLS)
}

func natsArgs(s *Server, cfg NATSConfig) ([]string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "listen: %q\nserver_name: \"node%d\"\nhttp: %q\n", s.Addr(), s.index, s.port(natsMonitor).Addr())
	if len(s.nodes) > 1 {
		fmt.Fprintf(&b, "cluster {\n  name: test\n  listen: %q\n  routes: [\n", s.port(natsRoutes).Addr())
		for _, node := range s.nodes {
			fmt.Fprintf(&b, "    \"nats://%s\"\n", node.port(natsRoutes).Addr())
		}
		b.WriteString("  ]\n}\n")
	}
	if !cfg.NoJetStream {
		fmt.Fprintf(&b, "jetstream {\n  store_dir: %q\n", s.data())
		if cfg.SyncAlways {
			b.WriteString("  sync_interval: always\n")
		}
		b.WriteString("}\n")
	}
	if cfg.User != "" {
		fmt.Fprintf(&b, "authorization { user: %q, password: %q }\n", cfg.User, cfg.Password)
	}
	if s.identity != nil {
		fmt.Fprintf(&b, "tls { ca_file: %q, cert_file: %q, key_file: %q, verify: %s }\n",
			s.identity.path(caFile), s.identity.path(serverCertFile), s.identity.path(serverKeyFile),
			strconv.FormatBool(s.identity.mode == MutualTLS))
	}
	b.WriteString(cfg.Config + "\n")
	name := filepath.Join(s.dir, "nats.conf")
	return []string{"-c", name}, os.WriteFile(name, []byte(b.String()), 0o600)
}

// NATSMonitor returns the URL of a NATS server's monitoring pages, which tell what it
// holds for its clients: "/connz?subs=1", "/subsz", "/jsz".
func (s *Server) NATSMonitor() string { return "http://" + s.port(natsMonitor).Addr() }

// natsReady asks for the health of JetStream too: a node listens for clients before
// its cluster has a leader.
func natsReady(ctx context.Context, s *Server) error {
	return healthy(ctx, s.NATSMonitor()+"/healthz", nil, `"status":"ok"`)
}

package testserver

import (
	"bufio"
	"context"
	"fmt"
	"net"
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

// StartNATS starts a NATS server. ctx governs the start only; without a deadline
// the server has a minute to get ready, not counting the time to build it.
func StartNATS(ctx context.Context, cfg NATSConfig) (*Server, error) {
	binary, err := pinnedBinary(ctx, "NATS_SERVER", "nats-server", "github.com/nats-io/nats-server/v2")
	if err != nil {
		return nil, err
	}
	scheme := "nats"
	if cfg.TLS != NoTLS {
		scheme = "tls"
	}
	return start(ctx, kind{
		name: "nats", binary: binary, ports: 1, scheme: scheme,
		args:  func(s *Server) ([]string, error) { return natsArgs(s, cfg) },
		ready: natsReady,
	}, cfg.TLS)
}

func natsArgs(s *Server, cfg NATSConfig) ([]string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "listen: %q\nserver_name: %q\n", s.Addr(), filepath.Base(s.dir))
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
			filepath.Join(s.dir, caFile), filepath.Join(s.dir, serverCertFile), filepath.Join(s.dir, serverKeyFile),
			strconv.FormatBool(s.identity.mode == MutualTLS))
	}
	b.WriteString(cfg.Config + "\n")
	name := filepath.Join(s.dir, "nats.conf")
	return []string{"-c", name}, os.WriteFile(name, []byte(b.String()), 0o600)
}

// natsReady waits for the greeting, which comes before authentication and TLS. The
// server listens for clients only after JetStream has recovered its streams.
func natsReady(ctx context.Context, s *Server) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.Addr())
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(line, "INFO ") {
		return fmt.Errorf("unexpected greeting %q", line)
	}
	return nil
}
